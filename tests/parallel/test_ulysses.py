"""Ulysses: splitting, exchanging and gathering tokens is exact, with every parameter's gradient."""

import dataclasses
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from wan_accel.models.denoiser import WanDenoiser, inject_ulysses
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import DitSize
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.ulysses import SequenceParallel, TokenSpan

SIZE = DitSize(
    dim=96,
    ffn_dim=64,
    num_layers=6,
    num_heads=8,
    in_dim=36,
    out_dim=16,
    freq_dim=32,
    text_dim=32,
    clip_dim=40,
)
ADAPTER = AnimateSize(
    dim=96, num_heads=8, num_face_blocks=2, motion_channels=(2,) * 8, motion_dim=32, face_width=16
)


SIZES = {
    "animate": SIZE,
    "i2v": dataclasses.replace(SIZE, num_layers=2),
    "ti2v": dataclasses.replace(SIZE, num_layers=2, in_dim=16, clip_dim=None),
}


def inputs_of(kind: str, height: int) -> dict[str, torch.Tensor]:
    """Inputs of a batch of 2; the second sample of ti2v is plain text to video."""
    inputs = dict(
        hidden_states=torch.randn(2, 16, 3, height, 6), timestep=torch.tensor([321.7, 950.3]),
        text=torch.randn(2, 16, 32),
    )  # fmt: skip
    if kind == "ti2v":
        return inputs | {"first_frame_timestep": torch.tensor([0.0, 950.3])}
    inputs |= dict(condition=torch.randn(2, 20, 3, height, 6), clip_features=torch.randn(2, 257, 40))
    if kind == "animate":
        inputs |= dict(pose_latents=torch.randn(2, 16, 2, height, 6), motion_vectors=torch.randn(2, 5, 32))
    return inputs


def model_and_gradients(
    group: dist.ProcessGroup | None, height: int, kind: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One forward and backward of a small denoiser: 3 frames of height/2 x 3 tokens."""
    torch.manual_seed(0)
    adapter = build_animate_adapter(ADAPTER) if kind == "animate" else None
    model = WanDenoiser(build_dit(SIZES[kind]), adapter, text_length=16)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1)
    if group is not None:
        inject_ulysses(model, group)
    out = model(**inputs_of(kind, height))
    (out * torch.randn(out.shape)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if group is not None:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return out.detach(), gradients


def sharded(ulysses: int, height: int, kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    dist.init_process_group("gloo")
    dims = ParallelDims(world_size=dist.get_world_size(), ulysses=ulysses)
    return model_and_gradients(dims.ulysses_group("cpu"), height, kind)


# 4 rows of tokens: 36 tokens, whole frames for no degree. 2 rows: 18 tokens, 5 a rank at degree 4, so that the
# last rank holds padding and a span crosses two frames, and the first frame lies on two ranks.
@pytest.mark.parametrize(
    ("kind", "ulysses", "height"),
    [("animate", 2, 8), ("animate", 4, 4), ("animate", 2, 4), ("i2v", 2, 4), ("ti2v", 2, 4), ("ti2v", 4, 4)],
)
def test_equals_one_rank(kind: str, ulysses: int, height: int) -> None:
    expected, expected_gradients = run_ranks(model_and_gradients, 1, None, height, kind, engine="single")[0]
    for out, gradients in run_ranks(sharded, ulysses, ulysses, height, kind):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            bound = 1e-5 * max(expected_gradients[name].norm().item(), 1.0)
            assert (gradient - expected_gradients[name]).norm().item() <= bound, name


def split_and_gather() -> bool:
    warnings.simplefilter("error", FutureWarning)  # torch's, of a collective that is called by an old name
    dist.init_process_group("gloo")
    parallel = SequenceParallel(dist.group.WORLD)
    x = torch.arange(14.0, requires_grad=True)
    whole = parallel.gather(parallel.split(x.view(1, 7, 2), dim=1), 7)
    whole.pow(2).sum().backward()
    # Each of the 3 ranks computes the whole loss: a slice gets 3 times its gradient, other slices none.
    start, stop = parallel.rank * 6, min(parallel.rank * 6 + 6, 14)
    expected = torch.zeros(14)
    expected[start:stop] = 3 * 2 * x.detach()[start:stop]
    return torch.equal(whole.detach().flatten(), x.detach()) and torch.equal(x.grad, expected)


def test_gather_is_the_inverse_of_split_with_summed_gradient() -> None:
    assert run_ranks(split_and_gather, 3) == [True] * 3


def test_token_span_frames() -> None:
    span = TokenSpan(start=5, length=5, tokens_per_frame=4)  # tokens 5..9 of frames 1 and 2
    x = torch.arange(5.0).view(1, 5, 1, 1)
    frames = span.to_frames(x)
    assert (span.first_frame, span.num_frames) == (1, 2)
    assert frames.flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    assert torch.equal(span.to_tokens(frames), x)
    beyond = TokenSpan(start=8, length=8, tokens_per_frame=4).frames_of(torch.ones(1, 3, 2))
    assert beyond[:, 0].sum() == 2 and beyond[:, 1].sum() == 0


def test_degrees() -> None:
    assert usable_degrees(40) == [1, 2, 4, 5, 8, 10]
    with pytest.raises(ValueError, match="ulysses=3 does not divide num_heads=40: use 1, 2, 4, 5, 8, 10"):
        ParallelDims(world_size=6, ulysses=3).validate(40)
    with pytest.raises(ValueError, match="ulysses=4 does not divide the 6 processes: use 1, 2"):
        ParallelDims(world_size=6, ulysses=4).validate(40)
    dims = ParallelDims(world_size=8, ulysses=2, dp_replicate=2)
    dims.validate(8)
    assert (dims.num_data_ranks, dims.dp_shard, [dims.data_rank(r) for r in range(8)]) == (
        4,
        4,
        [0, 0, 1, 1, 2, 2, 3, 3],
    )


def test_settings_that_are_not_honoured_are_refused() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    from wan_accel.parallel.fsdp import _refuse_unhonoured

    _refuse_unhonoured(FullyShardedDataParallelPlugin(fsdp_version=2))
    with pytest.raises(ValueError, match=r"set memory\.activation_checkpointing in the recipe"):
        _refuse_unhonoured(FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True))
    with pytest.raises(ValueError, match="fsdp_version=1 is not supported"):
        _refuse_unhonoured(FullyShardedDataParallelPlugin(fsdp_version=1))
