"""The text tower alone, forward and backward: prompts of 77 tokens, prompts cut at their end, prefix-shared prompts.

``python benchmarks/prefix_sharing.py``: ViT-B/16's text tower, random weights, eager PyTorch, from few labels to
many and from one condition to ten. Features and gradients of the three are compared before anything is timed.

Memory grows with the tokens of all prompts: 77 tokens at 80 labels and prompts cut at their end at 365 need
about 16 GB each; beyond, they are left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Set

import torch
from local_step import TEXT_PRODUCTS, Case, check_equal
from record import Row, append_record, floor_again, interleave, machine_floor, print_rows
from torch import Tensor

from fedmpt.export import methods

PLAIN, CUT, SHARED = "77 tokens", "cut at the end", "prefix-shared"
SIZES = [(20, 1), (20, 5), (20, 10), (80, 5), (365, 5), (1000, 5)]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12, help="of the text tower (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="%(default)s")
    parser.add_argument("--plain-up-to", type=int, default=80, help="most labels for 77 tokens (%(default)s)")
    parser.add_argument(
        "--cut-up-to", type=int, default=365, help="most labels for cut prompts (%(default)s)"
    )
    parser.add_argument("--labels-up-to", type=int, default=1000, help="%(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    floor = machine_floor(TEXT_PRODUCTS)
    sizes = [size for size in SIZES if size[0] <= arguments.labels_up_to]
    rows = []
    for labels, conditions in sizes:
        left_out = set()
        if labels > arguments.plain_up_to:
            left_out.add(PLAIN)
        if labels > arguments.cut_up_to:
            left_out.add(CUT)
        rows += measure(
            labels, conditions, arguments.layers, arguments.repeats, left_out, floor["matmul_flops"]
        )
    rows, floor = floor_again(rows, floor, TEXT_PRODUCTS)
    print_rows("Text tower, forward and backward", rows)
    append_record("prefix_sharing", rows, floor=floor)


def measure(
    labels: int, conditions: int, layers: int, repeats: int, left_out: Set[str], flops_per_second: float
) -> list[Row]:
    """The ways of one size in turn."""
    case = Case.make(labels, conditions, layers, photos=1)
    upstream = torch.randn(conditions, labels, 512, generator=torch.Generator().manual_seed(2))

    def run(encode: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        leaves = {
            name: case.state[name].detach().requires_grad_()
            for name in ("class_context", "condition_context")
        }
        text = encode(leaves)
        gradients = torch.autograd.grad((text * upstream).sum(), list(leaves.values()))
        return {"text": text.detach(), **dict(zip(leaves, gradients, strict=True))}

    ways: dict[str, Callable[[], dict[str, Tensor]]] = {
        PLAIN: lambda: run(case.whole_prompts),
        CUT: lambda: run(lambda leaves: case.whole_prompts(leaves, length=case.longest())),
        SHARED: lambda: run(lambda leaves: methods.text_features(case.setup, case.weights, leaves)),
    }
    ways = {name: way for name, way in ways.items() if name not in left_out}
    check_equal({name: way() for name, way in ways.items()}, SHARED)
    seconds = interleave(ways, repeats)
    parameters = {"labels": labels, "conditions": conditions, "layers": layers}
    first, *others = (
        Row(name, "s", samples, parameters, floor=case.text_flops() / flops_per_second)
        for name, samples in seconds.items()
    )
    return [first, *(row.compared_with(first) for row in others)]


if __name__ == "__main__":
    main()
