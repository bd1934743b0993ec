"""What a server counts, in the text format that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histogram, in seconds."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server. Only the thread of its event loop may change them."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and HTTP status."""
        self.histories = 0
        self.unknown_items = 0
        self.reloads: Counter[str] = Counter({"ok": 0, "failed": 0})
        self._in_bucket = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count one answered request for lists."""
        self._in_bucket[bisect_left(BUCKETS, seconds)] += 1
        self._seconds += seconds

    def text(self, in_flight: int, run: str, model: str) -> str:
        """All metrics; `in_flight`: requests that wait or are decoded; `run`, `model`: what
        answers."""
        return "\n".join(self._lines(in_flight, run, model)) + "\n"

    def _lines(self, in_flight: int, run: str, model: str) -> Iterator[str]:
        yield "# TYPE genrec_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'genrec_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, value in (("histories", self.histories), ("unknown_items", self.unknown_items)):
            yield f"# TYPE genrec_{name}_total counter"
            yield f"genrec_{name}_total {value}"
        yield "# TYPE genrec_reloads_total counter"
        for result, count in sorted(self.reloads.items()):
            yield f'genrec_reloads_total{{result="{result}"}} {count}'
        yield "# TYPE genrec_in_flight gauge"
        yield f"genrec_in_flight {in_flight}"
        yield "# TYPE genrec_model_info gauge"
        yield f'genrec_model_info{{run="{_escaped(run)}",model="{_escaped(model)}"}} 1'
        yield "# TYPE genrec_recommend_seconds histogram"
        total = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self._in_bucket, strict=True):
            total += count  # a bucket holds all that is not above its bound
            yield f'genrec_recommend_seconds_bucket{{le="{bound}"}} {total}'
        yield f"genrec_recommend_seconds_sum {self._seconds:.6f}"
        yield f"genrec_recommend_seconds_count {total}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
