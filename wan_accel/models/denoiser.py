"""WanDenoiser: diffsynth's Wan DiT (and Animate adapter) with our own forward.

Shapes: B batch, C latent channels, F latent frames (reference slot included), h x w latent height and width,
L tokens, T video frames.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffsynth.models.wan_video_animate_adapter import WanAnimateAdapter
from diffsynth.models.wan_video_dit import WanModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan_accel.models.attention import ATTENTION_BACKENDS, rope_table, upcast
from wan_accel.models.blocks import Fp32Linear, WanBlock, WanFaceBlock, WanHead, adopt
from wan_accel.models.dit import FACE_BLOCK_EVERY
from wan_accel.models.variants import TEXT_LENGTH
from wan_accel.parallel.degrees import usable_degrees
from wan_accel.parallel.ulysses import SequenceParallel, TokenSpan, UlyssesAttention

# Faces through the motion encoder at once; a 512 x 512 picture costs about 0.1 GB of activations in fp32.
FACES_PER_CHUNK = 8


class WanDenoiser(nn.Module):
    """Predicts the velocity noise - x_0 of a noisy video latent.

    It takes over the parameters of the modules that it is made from, under the original Wan names
    (`blocks.0.self_attn.q.weight`, `face_adapter.fuser_blocks.0...`), and leaves those modules unusable.

    Args:
        dit: diffsynth's DiT.
        adapter: Animate's adapter. Without its motion encoder (the usual case: motion vectors are cached)
            pass `with_motion_encoder=False`.
        with_motion_encoder: keep the motion encoder, to train it or to feed raw faces.
        text_length: text tokens that cross-attention sees, padding included.
    """

    patch_embedding: nn.Conv3d
    text_embedding: nn.Module
    time_embedding: nn.Module
    time_projection: nn.Module
    img_emb: nn.Module
    pose_patch_embedding: nn.Module
    face_encoder: nn.Module
    face_adapter: Any
    motion_encoder: Any
    head: WanHead

    def __init__(
        self,
        dit: WanModel,
        adapter: WanAnimateAdapter | None = None,
        *,
        with_motion_encoder: bool = False,
        text_length: int = TEXT_LENGTH,
    ) -> None:
        super().__init__()
        adopt(self, dit)
        self.blocks = nn.ModuleList(WanBlock(block) for block in dit.blocks)
        self.head = WanHead(dit.head)
        for sequence in (self.time_embedding, self.time_projection):
            assert isinstance(sequence, nn.Sequential)
            for index, layer in enumerate(sequence):
                if isinstance(layer, nn.Linear):
                    sequence[index] = Fp32Linear(layer)
        self.has_adapter = adapter is not None
        if adapter is not None:
            adopt(self, adapter)
            self.face_adapter.fuser_blocks = nn.ModuleList(map(WanFaceBlock, adapter.face_adapter.fuser_blocks))
            if with_motion_encoder:
                for name, parameter in self.motion_encoder.named_parameters():
                    # Blur kernels are constants; diffsynth happens to register them as parameters.
                    parameter.requires_grad_(not name.endswith(".kernel"))
            else:
                del self.motion_encoder
        self.text_length = text_length
        self.freq_dim: int = dit.freq_dim
        self.patch_size = tuple(dit.patch_size)
        self.num_heads = self.transformer_blocks[0].num_heads
        self.head_dim: int = dit.dim // self.num_heads
        self.sequence_parallel: SequenceParallel | None = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Tensor,
        *,
        condition: Tensor | None = None,
        clip_features: Tensor | None = None,
        pose_latents: Tensor | None = None,
        motion_vectors: Tensor | None = None,
        face_pixel_values: Tensor | None = None,
        first_frame_timestep: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: (B, C, F, h, w) noisy latents; for Animate frame 0 is the reference slot.
            timestep: (B,) fp32 in [0, 1000], 1000 * sigma.
            text: (B, S <= text_length, text_dim) umT5 states; zeros behind a caption's own length.
            condition: (B, c, F, h, w) joined to the channels of the noisy latents (mask, then known latents).
            clip_features: (B, 257, clip_dim).
            pose_latents: (B, C, F - 1, h, w), for latent frames 1.. .
            motion_vectors: (B, T, motion_dim), one a video frame; T compresses to F - 1.
            face_pixel_values: (B, 3, T, 512, 512) in [-1, 1], instead of motion vectors.
            first_frame_timestep: (B,) fp32, that of latent frame 0 where it is not `timestep`: 0 where the frame is
                known (wan/textimage2video.py, `i2v`).

        Returns:
            (B, C, F, h, w) fp32.

        Raises:
            ValueError: an input that the model needs is missing, or one that it cannot take is given.
        """
        self._check_inputs(condition, clip_features, pose_latents, motion_vectors, face_pixel_values)
        dtype = self.patch_embedding.weight.dtype
        x = hidden_states if condition is None else torch.cat([hidden_states, condition], dim=1)
        x = self.patch_embedding(x.to(dtype))
        if pose_latents is not None:
            x = x + F.pad(self.pose_patch_embedding(pose_latents.to(dtype)), (0, 0, 0, 0, 1, 0))
        grid = (x.shape[2], x.shape[3], x.shape[4])
        span, in_first_frame = self._span(grid), None
        if first_frame_timestep is not None:
            # Two rows a sample, which tokens choose from: a row a token would be 1 GB at 27,280 tokens.
            timestep = torch.stack([first_frame_timestep, timestep], dim=1)
            in_first_frame = span.in_first_frame(x.device)
        time_embedding = self.time_embedding(sinusoidal_embedding(timestep, self.freq_dim))
        modulation = self.time_projection(time_embedding).unflatten(-1, (6, -1))  # (B, [2,] 6, C) fp32
        context = self._embed_context(text.to(dtype), clip_features)
        motion = self._embed_motion(motion_vectors, face_pixel_values, dtype)
        # Contiguous: every block keeps the layout that it is given, and its norms would read with a stride of L.
        x = x.flatten(2).transpose(1, 2).contiguous()
        x = self._run_blocks(x, grid, span, context, modulation, motion, in_first_frame)
        x = self.head(x, time_embedding, in_first_frame)
        if self.sequence_parallel is not None:
            x = self.sequence_parallel.gather(x, grid[0] * grid[1] * grid[2])
        # A copy: FSDP2 hangs its hook on the output, and an in-place operation on a view would drop it.
        return upcast(self._unpatchify(x, grid)).clone()

    def _check_inputs(
        self,
        condition: Tensor | None,
        clip_features: Tensor | None,
        pose_latents: Tensor | None,
        motion_vectors: Tensor | None,
        face_pixel_values: Tensor | None,
    ) -> None:
        """Compare the optional inputs with what the model's parameters need."""
        takes_condition = self.patch_embedding.in_channels != self._out_channels
        wanted = {
            "condition": (takes_condition, condition is not None),
            "clip_features": (hasattr(self, "img_emb"), clip_features is not None),
            "pose_latents": (self.has_adapter, pose_latents is not None),
            "motion_vectors": (self.has_adapter, motion_vectors is not None or face_pixel_values is not None),
        }
        for name, (needed, given) in wanted.items():
            if needed and not given:
                raise ValueError(f"WanDenoiser needs {name}: this checkpoint has weights for it")
            if given and not needed:
                raise ValueError(f"WanDenoiser cannot take {name}: this checkpoint has no weights for it")

    @property
    def transformer_blocks(self) -> list[WanBlock]:
        """The blocks in order, with their type."""
        return [cast(WanBlock, block) for block in self.blocks]

    @property
    def _out_channels(self) -> int:
        patch_t, patch_h, patch_w = self.patch_size
        return self.head.head.out_features // (patch_t * patch_h * patch_w)

    def _embed_context(self, text: Tensor, clip_features: Tensor | None) -> Tensor:
        """Text (B, S, text_dim) zero-padded to text_length, behind the CLIP tokens where there are any.

        Padding tokens are not masked: the original attends to them, and so the weights expect it.
        """
        context = self.text_embedding(F.pad(text, (0, 0, 0, self.text_length - text.shape[1])))
        if clip_features is None:
            return context
        return torch.cat([self.img_emb(clip_features.to(text.dtype)), context], dim=1)

    def _embed_motion(self, motion_vectors: Tensor | None, faces: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Motion tokens (B, F, N, C); the reference slot's are zeros."""
        if faces is not None:
            motion_vectors = self.encode_motion(faces.to(dtype))
        if motion_vectors is None:
            return None
        tokens = self.face_encoder(motion_vectors.to(dtype))
        return F.pad(tokens, (0, 0, 0, 0, 1, 0))

    def encode_motion(self, faces: Tensor) -> Tensor:
        """Faces (B, 3, T, 512, 512) in [-1, 1] -> motion vectors (B, T, motion_dim).

        Raises:
            ValueError: the motion encoder was left out.
        """
        if not hasattr(self, "motion_encoder"):
            raise ValueError(
                "this WanDenoiser was built without its motion encoder: pass motion_vectors instead of faces"
            )
        return encode_motion(self.motion_encoder, faces)

    def _span(self, grid: tuple[int, int, int]) -> TokenSpan:
        """The tokens that this rank works on."""
        tokens_per_frame = grid[1] * grid[2]
        num_tokens = grid[0] * tokens_per_frame
        if self.sequence_parallel is not None:
            return self.sequence_parallel.span(num_tokens, tokens_per_frame)
        return TokenSpan(start=0, length=num_tokens, tokens_per_frame=tokens_per_frame)

    def _run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        span: TokenSpan,
        context: Tensor,
        modulation: Tensor,
        motion: Tensor | None,
        in_first_frame: Tensor | None,
    ) -> Tensor:
        num_tokens = x.shape[1]
        cos, sin = rope_table(grid, self.head_dim, x.device, modulation.dtype)
        if self.sequence_parallel is not None:
            x = self.sequence_parallel.split(x, dim=1)
            cos, sin = (self.sequence_parallel.split(table, dim=0) for table in (cos, sin))
        for index, block in enumerate(self.transformer_blocks):
            if self.sequence_parallel is not None:
                block.self_attn.attn.num_tokens = num_tokens
            x = block(x, context, modulation, cos, sin, in_first_frame)
            if motion is not None and index % FACE_BLOCK_EVERY == 0:
                x = self.face_adapter.fuser_blocks[index // FACE_BLOCK_EVERY](x, motion, span)
        return x

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, f*h*w, pt*ph*pw*C) -> (B, C, f*pt, h*ph, w*pw)."""
        x = x.unflatten(1, grid).unflatten(-1, (*self.patch_size, -1))  # (B, f, h, w, pt, ph, pw, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def encode_motion(motion_encoder: Any, faces: Tensor) -> Tensor:
    """Faces (B, 3, T, 512, 512) in [-1, 1] -> motion vectors (B, T, motion_dim), in chunks.

    diffsynth's `get_motion` uses reentrant checkpointing, under which the encoder never gets a gradient.
    """
    frames = faces.transpose(1, 2).flatten(0, 1)

    def encode(chunk: Tensor) -> Tensor:
        return motion_encoder.dec.direction(motion_encoder.enc.enc_motion(chunk))

    vectors = [
        checkpoint(encode, chunk, use_reentrant=False) if torch.is_grad_enabled() else encode(chunk)
        for chunk in frames.split(FACES_PER_CHUNK)
    ]
    return torch.cat(vectors).unflatten(0, (faces.shape[0], -1))


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin](timestep * 10000^(-i / (dim/2))): (...) -> (..., dim) in timestep's dtype, angles in fp64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double().unsqueeze(-1) * 10000.0**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(timestep.dtype)


def set_attention(model: WanDenoiser, name: str) -> None:
    """Put a row of `ATTENTION_BACKENDS` into every block; Animate's face blocks keep torch's own choice.

    Call it before `inject_ulysses`, which wraps what it finds.
    """
    processor = ATTENTION_BACKENDS[name].processor
    for block in model.transformer_blocks:
        for attention in (block.self_attn, block.cross_attn):
            attention.attn = processor(model.num_heads)


def inject_ulysses(model: WanDenoiser, group: torch.distributed.ProcessGroup) -> WanDenoiser:
    """Split the model's tokens over `group` and put Ulysses attention into every block.

    Every rank of the group must be fed the same inputs. Call it before compiling or sharding.

    Raises:
        ValueError: the group's size does not divide the heads.
    """
    return split_tokens(model, SequenceParallel(group))


def split_tokens(model: WanDenoiser, parallel: SequenceParallel) -> WanDenoiser:
    """`inject_ulysses` for a group that is wrapped already."""
    if model.num_heads % parallel.size:
        degrees = ", ".join(map(str, usable_degrees(model.num_heads)))
        raise ValueError(f"parallel.ulysses={parallel.size} does not divide num_heads={model.num_heads}: use {degrees}")
    model.sequence_parallel = parallel
    for block in model.transformer_blocks:
        inner = type(block.self_attn.attn)(model.num_heads // parallel.size)
        block.self_attn.attn = UlyssesAttention(inner, parallel, model.num_heads)
    return model
