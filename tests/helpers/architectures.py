"""Public architectures that are gated, derived and exported by tests/zoo/gates/test_architectures.py.

`python tests/helpers/architectures.py` writes docs/architectures.md from this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@dataclass(frozen=True)
class Case:
    """An architecture of a library, and what gating makes of it.

    `convolutions` counts the nn.Conv2d layers, `gates` those of the main branch; the others are projections of
    shortcuts. `ungated` counts convolutions of other kinds, which are shared by all paths and named in a warning.
    """

    library: str
    name: str
    convolutions: int
    gates: int
    ungated: int = 0
    size: int = 32
    exported: bool = False  # in a default run; the others with --exhaustive
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("torchvision", "alexnet", 5, 5, size=64),
    Case("torchvision", "convnext_tiny", 22, 22),
    Case("torchvision", "densenet121", 120, 120),
    Case("torchvision", "efficientnet_b0", 81, 81),
    Case("torchvision", "googlenet", 57, 57, size=64, options={"aux_logits": False, "init_weights": False}),
    Case("torchvision", "inception_v3", 94, 94, size=96, options={"aux_logits": False, "init_weights": False}),
    Case("torchvision", "mnasnet0_5", 52, 52),
    Case("torchvision", "mnasnet1_0", 52, 52),
    Case("torchvision", "mobilenet_v2", 52, 52),
    Case("torchvision", "mobilenet_v3_large", 62, 62),
    Case("torchvision", "mobilenet_v3_small", 52, 52, exported=True),
    Case("torchvision", "regnet_x_400mf", 71, 67),
    Case("torchvision", "regnet_y_400mf", 85, 81),
    Case("torchvision", "resnet18", 20, 17, exported=True),
    Case("torchvision", "resnet34", 36, 33),
    Case("torchvision", "resnet50", 53, 49),
    Case("torchvision", "resnext50_32x4d", 53, 49),
    Case("torchvision", "shufflenet_v2_x0_5", 56, 56, exported=True),
    Case("torchvision", "shufflenet_v2_x1_0", 56, 56),
    Case("torchvision", "squeezenet1_0", 26, 26, size=64),
    Case("torchvision", "squeezenet1_1", 26, 26, size=64, exported=True),
    Case("torchvision", "swin_t", 1, 1, size=64, exported=True),
    Case("torchvision", "vgg11", 8, 8, size=64),
    Case("torchvision", "vgg16_bn", 13, 13, size=64),
    Case("torchvision", "vit_b_16", 1, 1, options={"image_size": 32}),
    Case("timm", "dla34", 38, 34),
    Case("timm", "ecaresnet26t", 31, 27, 8, exported=True),
    Case("timm", "efficientnet_lite0", 49, 49),
    Case("timm", "ghostnet_100", 95, 85),
    Case("timm", "hrnet_w18_small", 91, 86, size=64),
    Case("timm", "mobilenetv4_conv_small", 46, 46),
    Case("timm", "mobileone_s1", 65, 65),
    Case("timm", "nf_resnet26", 29, 25, exported=True),
    Case("timm", "repvgg_a0", 44, 44),
    Case("timm", "resnet26d", 31, 27),
    Case("timm", "resnetv2_50", 54, 50),
    Case("timm", "rexnet_100", 75, 75),
    Case("timm", "selecsls42b", 41, 41),
    Case("timm", "skresnet18", 44, 41),
    Case("timm", "tinynet_e", 51, 51),
)


def page() -> str:
    """Return docs/architectures.md."""
    rows = "\n".join(
        f"| {case.library} | `{case.name}` | {case.size} | {case.convolutions} | {case.gates} | "
        f"{case.convolutions - case.gates or '–'} | {case.ungated or '–'} |"
        for case in CASES
    )
    return f"""# Architectures

A random gated network needs no code of its own: `manygates.randomly_gate(network)` gates any network that `torch.fx`
can trace. These {len(CASES)} architectures are tested. Their gates are counted; a random path equals its derived
network bit for bit; the exported graphs of that path and of all gates answer as torch does, within 1e-4 of the logits'
size. Weights are random, every BatchNorm has statistics of its own, and images are square, of the size in the table.

Every `nn.Conv2d` has a gate, subclasses included, except the projection on the shortcut of a residual block.
Convolutions of other kinds have none: all paths share them, and a warning names them. `swin_t` and `vit_b_16` have one
convolution; gating them warns that this hardly makes an ensemble.

| library | network | image size | 2-d convolutions | gates | shared projections | other convolutions |
|---|---|---|---|---|---|---|
{rows}

Each row is a case of `tests/zoo/gates/test_architectures.py`; `python tests/helpers/architectures.py` writes this page.
`make test` counts the gates and compares the derived network for every row; it exports one architecture per family:
{", ".join(f"`{case.name}`" for case in CASES if case.exported)}. All are exported with
`make test PYTEST_ARGS="--exhaustive tests/zoo/gates/test_architectures.py"`.

## What is refused

`randomly_gate`, `folded_copy` and the exporter compare what they make with the network itself, on random images in
batches of 1, 2 and 5 and along several paths ([ADR 0014](adr/0014-self-checks.md)). Where it differs they raise
`BadInput` with the reason:

- a forward that depends on the values or the batch size of its images, or that was replaced on the object;
- a hook on the network itself (hooks on the layers inside are kept);
- a network that answers the same images differently at each call in evaluation mode;
- a convolution that changes nothing, because it borrows another layer's weight or nothing uses its output;
- `weight_norm` and `spectral_norm` of the old kind, and pruning, which compute the weight in a hook: use those of
  `torch.nn.utils.parametrizations`, which can be gated, or make the weight permanent (`prune.remove`);
- a forward that asks for the type of its images (`isinstance`): the exporter takes it, gates cannot;
- a network that answers very differently when its images are a millionth brighter;
- in the exporter, an operation on the tensors of two gates, and a branch or a loop.

## Known limits

- A norm that replaces its statistics instead of updating them in place trains the network's own, not the candidate's.
- A layer that merges weights in `train()` and `eval()` (LoRA) cannot change mode once its tensors are in the bank.
- Two parameters that are overlapping views of one tensor become two tensors.
- A hook is copied with the objects that it refers to by name or closure: it still sees the original network.
- `orthogonal` can be gated but not exported; its matrix exponential has no ONNX form.
- A forward that asks for the shape of its images (`assert x.shape[1] == 3`) cannot be traced.

## Ties

Layers that share a tensor stay tied and shared, and a warning names them. A module that is called several times has one
gate for all calls. Frozen layers stay frozen in every candidate.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
