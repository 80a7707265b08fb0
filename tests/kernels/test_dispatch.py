"""The public functions refuse what does not fit, name it, and can be compiled around."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmpt import kernels

PAPER: dict[str, Any] = {"logit_scale": 100.0, "tau": 4.0, "reg": 0.2, "iterations": 10}
LOSS: dict[str, Any] = {"gamma_pos": 1.0, "gamma_neg": 2.0, "clip": 0.05}


def head_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "tokens": normalize(torch.randn(3, 7, 8, generator=generator), dim=-1),
        "text": normalize(torch.randn(2, 5, 8, generator=generator), dim=-1),
        "gate": torch.rand(3, 2, generator=generator).softmax(1),
        "scale": torch.tensor(5.0),
        "bias": torch.tensor(-1.0),
        "labels": torch.randint(-1, 2, (3, 5), generator=generator, dtype=torch.int8),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(2, 5, 9)}, "tokens has shape [3, 7, 8]; expected [B, M, D=9]"),
        ({"text": torch.zeros(5, 8)}, "text has shape [5, 8]; expected [N, C, D]"),
        (
            {"tokens": torch.zeros(3, 4, 7, 8)},
            "tokens has shape [3, 4, 7, 8]; expected [B, N=2, M, D=8]",
        ),
        ({"tokens": torch.zeros(3, 0, 8)}, "at least one patch, condition and label is needed"),
        ({"tokens": torch.zeros(3, 7, 8, dtype=torch.int8)}, "tokens is torch.int8; a floating-point"),
        (
            {"text": torch.zeros(2, 5, 8, device="meta")},
            "text is on meta, but the tensors before it are on cpu",
        ),
        (
            {"adapters": (torch.zeros(2, 4, 8), torch.zeros(2, 8, 3))},
            "adapters[1] has shape [2, 8, 3]; expected [N=2, D=8, r=4]",
        ),
        ({"pooling": "mean"}, "pooling is 'mean'; use one of transport, softmax, max"),
        ({"reg": 0.0}, "reg is 0.0; it must be above 0"),
        ({"tau": -1.0}, "tau is -1.0; it must be above 0"),
        ({"iterations": 0}, "iterations is 0; at least 1 is needed"),
    ],
)
def test_transport_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = head_inputs()
    arguments = {"tokens": inputs["tokens"], "text": inputs["text"], **PAPER, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.region_transport(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(3, 3)}, "gate has shape [3, 3]; expected [B=3, N=2]"),
        ({"scale": torch.zeros(1)}, "scale has shape [1]; expected []"),
        ({"labels": torch.zeros(3, 4)}, "labels has shape [3, 4]; expected [B=3, C=5]"),
        ({"labels": torch.zeros(3, 5, device="meta")}, "labels is on meta"),
        ({"gamma_neg": -1.0}, "gamma_neg is -1.0; it must be at least 0"),
        ({"clip": 1.0}, "clip is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_loss_names_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = head_inputs()
    arguments = {
        "psi": torch.zeros(3, 2, 5),
        **{name: inputs[name] for name in ("gate", "scale", "bias", "labels")},
        **LOSS,
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        kernels.gated_asymmetric_loss(**arguments)


def test_non_contiguous_inputs_equal_contiguous_ones() -> None:
    inputs = head_inputs()
    tokens = inputs["tokens"].transpose(1, 2).contiguous().transpose(1, 2)
    text = torch.stack([inputs["text"], inputs["text"]], -1)[..., 0]
    assert not tokens.is_contiguous()
    assert not text.is_contiguous()
    found = kernels.region_transport(tokens, text, **PAPER)
    torch.testing.assert_close(found, kernels.region_transport(inputs["tokens"], inputs["text"], **PAPER))


def head_loss(text: Tensor, scale: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    psi = kernels.region_transport(inputs["tokens"], text, **PAPER)
    assert isinstance(psi, Tensor)
    return kernels.gated_asymmetric_loss(psi, inputs["gate"], scale, inputs["bias"], inputs["labels"], **LOSS)


def test_compiles_as_one_graph_with_equal_loss_and_gradients() -> None:
    inputs = head_inputs()
    variables = inputs["text"].requires_grad_(), inputs["scale"].requires_grad_()
    compiled = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*variables, inputs), head_loss(*variables, inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables)
    )


def test_importing_and_running_on_a_cpu_does_not_import_triton() -> None:
    program = (
        "import sys, torch\nfrom fedmpt import kernels\n"
        "kernels.asymmetric_loss(torch.zeros(1, 2), torch.ones(1, 2), gamma_pos=1., gamma_neg=2., clip=.05)\n"
        "assert not any(name.startswith('fedmpt.kernels.triton') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
