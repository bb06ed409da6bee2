"""Ulysses: splitting, exchanging and gathering tokens is exact, with every parameter's gradient."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel.test_equivalence import make_trainer
from ranks import run_ranks
from synthetic import tiny_denoiser

from wan_accel.models.denoiser import WanDenoiser, inject_ulysses
from wan_accel.models.dit import AnimateSize, build_animate_adapter, build_dit
from wan_accel.models.variants import DitSize
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.mesh import ParallelDims
from wan_accel.parallel.ulysses import SequenceParallel, TokenSpan
from wan_accel.plan.simulate import fake_ranks

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
    [
        *(("animate", 2, 8), ("animate", 4, 4), ("animate", 2, 4)),
        *(("i2v", 2, 4), ("i2v", 4, 4), ("ti2v", 2, 4), ("ti2v", 4, 4)),
    ],
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


def spans_of(size: int, num_tokens: int, tokens_per_frame: int) -> list[TokenSpan]:
    """The spans of all ranks of a group."""
    length = -(-num_tokens // size)
    return [
        TokenSpan(start=rank * length, length=length, tokens_per_frame=tokens_per_frame) for rank in range(size)
    ]  # fmt: skip


# 12, 27 and 36 tokens: whole frames, frames cut in two and more, padding, and ranks with nothing but padding.
SPLITS = [(size, per_frame) for size in (2, 3, 4, 5, 7, 8) for per_frame in (4, 9, 12)]


@pytest.mark.parametrize(("size", "tokens_per_frame"), SPLITS)
def test_a_face_block_is_the_same_on_any_split(size: int, tokens_per_frame: int) -> None:
    block = tiny_denoiser("animate-14b").face_adapter.fuser_blocks[0]
    num_tokens = 3 * tokens_per_frame
    x = torch.randn(2, num_tokens, 96, requires_grad=True)
    motion = torch.randn(2, 3, 5, 96, requires_grad=True)

    def run(spans: list[TokenSpan]) -> list[torch.Tensor]:
        padded = F.pad(x, (0, 0, 0, spans[-1].start + spans[-1].length - num_tokens))
        pieces = [block.compute(padded[:, one.start : one.start + one.length], motion, one) for one in spans]
        out = torch.cat(pieces, dim=1)[:, :num_tokens]
        weights = list(block.parameters())
        return [out, *torch.autograd.grad((out * torch.arange(96)).sum(), [x, motion, *weights])]

    whole = run(spans_of(1, num_tokens, tokens_per_frame))
    for found, expected in zip(run(spans_of(size, num_tokens, tokens_per_frame)), whole, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()  # fp32, summed in another order


@pytest.mark.parametrize(("size", "tokens_per_frame"), SPLITS)
def test_the_first_frame_is_told_apart_on_any_split(size: int, tokens_per_frame: int) -> None:
    spans = spans_of(size, 3 * tokens_per_frame, tokens_per_frame)
    found = torch.cat([one.in_first_frame(torch.device("cpu")) for one in spans])
    assert found.flatten().nonzero().flatten().tolist() == list(range(tokens_per_frame))


def test_a_group_that_does_not_divide_the_heads_is_refused_where_it_is_put_in() -> None:
    with fake_ranks(3):
        assert dist.group.WORLD is not None
        with pytest.raises(ValueError, match=r"ulysses=3 does not divide num_heads=8: use 1, 2, 4, 8$"):
            inject_ulysses(tiny_denoiser("t2v-1.3b"), dist.group.WORLD)


def test_a_trainer_refuses_such_a_degree(tmp_path: Path) -> None:
    """Before it makes a group: one process is enough to see it."""
    options = {"world_size": 1, "engine": "single"}
    with pytest.raises(RuntimeError, match=r"parallel\.ulysses=3 does not divide num_heads=8: use 1, 2, 4, 8"):
        run_ranks(make_trainer, 1, "t2v-1.3b", "full", 3, str(tmp_path), options, engine="single")


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
