"""A FLUX.1-Kontext pipeline with random weights, in the layout that diffusers saves."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

_WIDTH = 32


def write_tiny_flux(folder: Path) -> Path:
    """Every part is of the released class, small."""
    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "person", "pose", "Hands"])}
    clip = CLIPTextConfig(
        hidden_size=_WIDTH, projection_dim=_WIDTH, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=len(words), max_position_embeddings=77, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(words), d_model=_WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=1, norm_num_groups=1, sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            shift_factor=0.0609, scaling_factor=1.5035,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=_tokenizer(words, 77),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=_tokenizer(words, 512),
        transformer=FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=_WIDTH, pooled_projection_dim=_WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _tokenizer(words: dict[str, int], max_length: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
