"""A parser that checks a page and collects what a browser would show and fetch."""

from html.parser import HTMLParser

EVIL = '<script>alert("1")</script> & $x_$ "é"'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what a browser would show and fetch."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.words, self.images = [], [], [], [], "", []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[k] for k in ("src", "href", "xlink:href", "data", "action") if k in attrs]
        self.images += [attrs["src"]] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if tag in VOID:
            return self.handle_starttag(tag, attrs)
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += data
