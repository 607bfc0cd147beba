"""The speed table on screen, as CSV (one row per goal, the peers as columns) and as a plot (one panel per goal table)."""

import csv
from pathlib import Path

OURS = "l2r2"
OWN = ["ms_median", "ms_p20", "ms_p80", "bytes", "flops", "pct_copy", "pct_matmul", "ratio", "must", "stretch", "note"]
GREEN, RED, GREY = "#2a7f4f", "#b5472f", "#9a9a9a"


def show(row: dict) -> str:
    """One provider's row as a line of text."""
    parts = [f"{row['op']:18} {row['case']:44} {row['provider']:26}"]
    if row["ms_median"] is None:
        parts.append(f"not timed ({row['note'] or 'no times'})")
    else:
        parts.append(f"{row['ms_median']:9.3f} ms ({row['ms_p20'] or 0:.3f}-{row['ms_p80'] or 0:.3f})")
    texts = {"pct_copy": "{:5.1f} % copy", "ratio": "{:7.2f}x", "must": "must {:.2f}x", "stretch": "stretch {:.2f}x"}
    parts += [text.format(row[name]) for name, text in texts.items() if row[name] is not None]
    return "  ".join(parts)


def summary(table: list[dict]) -> list[str]:
    """The goal table: one line per case of ours, with what was measured and what was to be reached."""
    lines = [f"{'op':18} {'case':60} {'ms':>9} {'ratio':>8} {'must':>8} {'stretch':>8}"]
    for line in goals(table):
        numbers = [line.get(name) for name in ("ratio", "must", "stretch")]
        ms = "-" if line.get("ms_median") is None else f"{line['ms_median']:.3f}"
        shown = ["-" if number is None else f"{number:.2f}x" for number in numbers]
        verdict = line.get("note") or _verdict(*numbers[:2])
        lines.append(f"{line['op']:18} {line['case']:60} {ms:>9} {shown[0]:>8} {shown[1]:>8} {shown[2]:>8}  {verdict}".rstrip())
    return lines


def _verdict(ratio: float | None, must: float | None) -> str:
    if must is None:
        return ""
    if ratio is None:
        return "not measured"
    return "held" if ratio >= must else "missed"


def goals(table: list[dict]) -> list[dict]:
    """Make one row per goal: our measurements, then the median time of each peer and its ratio to ours."""
    lines: dict[tuple[str, str], dict] = {}
    for row in table:
        line = lines.setdefault((row["op"], row["case"]), {"op": row["op"], "case": row["case"]})
        if row["provider"] == OURS:
            line |= {name: row[name] for name in OWN}
        else:
            line |= {f"{row['provider']} ms": row["ms_median"], f"{row['provider']} ratio": row["ratio"]}
    return list(lines.values())


def write_csv(path: Path, table: list[dict], about: dict) -> None:
    lines = goals(table)
    peers = dict.fromkeys(name for line in lines for name in line if name not in OWN)
    fields = ["op", "case", *OWN, *(name for name in peers if name not in ("op", "case")), *about]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(line | about for line in lines)


def write_plot(path: Path, table: list[dict], title: str) -> None:
    """Bars of our ratio over the "must" ratio, with a mark at "must" (1) and one at "stretch"."""
    from matplotlib.figure import Figure  # without pyplot, which has global state

    lines = [line for line in goals(table) if line.get("must")]
    panels = [("1. roi_views", [line for line in lines if line["op"] == "roi_views"])]
    panels.append(("2. masked attention and packing", [line for line in lines if line["op"] != "roi_views"]))
    figure = Figure(figsize=(11, 2.4 + 0.36 * len(lines)), layout="constrained")
    heights = [max(len(panel), 1) + 1 for _, panel in panels]
    for axes, (name, panel) in zip(figure.subplots(2, 1, height_ratios=heights), panels):
        _panel(axes, name, panel)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _panel(axes, name: str, lines: list[dict]) -> None:
    shares = [(line["ratio"] or 0) / line["must"] for line in lines]
    places = range(len(lines))
    axes.barh(places, shares, color=[GREEN if share >= 1 else RED for share in shares], height=0.6)
    axes.axvline(1, color="black", linewidth=1.2, label="must")
    stretch = [(place, line["stretch"] / line["must"]) for place, line in zip(places, lines) if line["stretch"]]
    axes.scatter([x for _, x in stretch], [y for y, _ in stretch], marker="|", s=220, color=GREY, linewidths=2.5, label="stretch")
    for place, line in zip(places, lines):  # in a separate column, so that no bar or mark overlaps
        text = "not measured" if line["ratio"] is None else f"{line['ratio']:.2f}x (must {line['must']:.2f}x)"
        axes.text(1.01, place, text, va="center", fontsize=8, transform=axes.get_yaxis_transform())
    axes.set_yticks(places, [f"{line['op']}: {line['case']}" for line in lines], fontsize=8)
    axes.set_xlim(0, 1.03 * max([1.6, *shares, *(x for _, x in stretch)]))
    axes.invert_yaxis()
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel("speed ratio over the ratio that it must reach", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
