"""A reader of the page of a training run, which checks its form, and a layer to show on one."""

import html.parser

from daqconvert.report.layer_cards import LayerReport

VOID = {"meta", "path", "use", "br"}


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def layer(name, bits=(2, 4), epochs=3):
    measure = {"weight": [-3.0, 2.5], "weight_spread": [2.5, 2.5], "input": [0.0, 1.25], "scale": [0.1, 0.2, 0.4]}
    moments = [(epoch, measure) for epoch in range(epochs + 1)]
    counts = [4, 3, 2, 1] if bits[0] == 2 else [1] * 2 ** (bits[0] or 0)
    return LayerReport(name, "Conv2d", 9216, bits, moments, counts, counts[::-1], "std", 0.0123, 0.0, "default")
