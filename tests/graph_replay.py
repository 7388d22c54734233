"""The one check that work can be captured in a CUDA graph."""

from collections.abc import Callable, Iterable

import torch


def assert_replays(run: Callable[[], Iterable[torch.Tensor]]) -> None:
    """`run` captured and replayed gives the bits that it gives by itself."""
    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        assert a.equal(e)
