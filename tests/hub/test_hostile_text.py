"""User text that could do harm: in cards, snippets and terminals."""

import ast
import re

import pytest
import timm
import torch
import yaml

from l2r2_cli.common import errors
from l2r2_models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from l2r2_models.errors import L2R2Error, printable
from l2r2_models.hub.card import model_card
from l2r2_models.hub.markdown import code, literal, plain
from l2r2_models.hub.metadata import CardMetadata
from l2r2_models.io import write_text

HOSTILE = [
    "<script>alert(1)</script>",
    "`</code><img src=x onerror=alert(1)>",
    "a | b\n| c",
    "x\n```\nimport os; os.system('echo')\n```",
    '")\nimport os; os.system("echo")  # "',
    "---\nlicense: mit\n---",
    "[click](javascript:alert(1))",
    "\x1b[2J\x07name",
    "mushroom \U0001f344",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_shows_hostile_text_and_obeys_none_of_it(text, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("l2r2", backbone="resnet10t", num_classes=2)
    localizer = {"spec": f"owlv2:org/model?prompt={text}", "license": text}
    save_checkpoint(model, tmp_path / "run", [text, "other"], localizer=localizer)
    rows = {text: {"accuracy": 0.5, "by_group": {text: 0.5}}, "full": {"accuracy": 0.5, "by_group": {text: 0.5}}}
    evaluation = {"data": text, "split": text, "images": 3, "rows": rows, "warnings": [text]}
    facts = CardMetadata("mit", text, text, None, text, text, text)
    card = model_card(load_checkpoint(tmp_path / "run"), "org/name", facts, [evaluation])
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(front)["license"] == "mit" and yaml.safe_load(front)["library_name"] == "l2r2_models"
    snippets = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2 and body.count("\n```") == 6  # two snippets and the citation, each opened and closed
    for snippet in snippets:
        imports = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("os" in [alias.name for alias in node.names] for node in imports)
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL))
    assert "<script" not in prose and "<img" not in prose and "\x1b" not in card and not re.search(r"[^\\]\]\(javascript", prose)


@pytest.mark.parametrize("text", HOSTILE)
def test_escapes_by_context(text):
    assert "\n" not in plain(text) + code(text) + literal(text)
    assert code(text).count("`") == 2 and "<" not in plain(text)
    assert ast.literal_eval(literal(text)) == text


def test_a_name_cannot_drive_the_terminal(capsys):
    name = "photo\x1b[2J\x9b31m\r\x07.jpg"
    assert "\x1b" not in str(L2R2Error(f"{name}: no such file.")) and "\\x1b[2J" in str(L2R2Error(name))
    errors.print(f"failed: {name}")
    assert not set("\x1b\x9b\r\x07") & set(capsys.readouterr().err.rstrip("\n"))
    assert printable("Bär 写真 a b") == "Bär 写真 a b"


def test_a_device_is_not_replaced_and_files_follow_the_umask(tmp_path):
    import os
    import subprocess
    import sys

    with pytest.raises(L2R2Error, match="/dev/null: is not a regular file"):
        write_text("/dev/null", "x")
    assert not os.path.isfile("/dev/null")
    program = f"import os; os.umask(0o027); from l2r2_models.io import write_text; write_text({str(tmp_path / 'a')!r}, 'x')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
