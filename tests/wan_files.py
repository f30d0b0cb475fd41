"""Published Wan files for tests: their tasks, headers with their shapes, and diffusers' names of their keys."""

from pathlib import Path

import torch

from musubi_tuner.weights.reader import Header, TensorInfo

PUBLISHED = {
    "wan2_1_t2v_1_3b": "t2v-1.3B",
    "wan2_1_t2v_14b": "t2v-14B",
    "wan2_1_t2i_14b": "t2i-14B",
    "wan2_1_i2v_14b": "i2v-14B",
    "wan2_1_flf2v_14b": "flf2v-14B",
    "wan2_1_t2v_1_3b_fc": "t2v-1.3B-FC",
    "wan2_1_t2v_14b_fc": "t2v-14B-FC",
    "wan2_1_i2v_14b_fc": "i2v-14B-FC",
    "wan2_2_t2v_a14b": "t2v-A14B",
    "wan2_2_i2v_a14b": "i2v-A14B",
}
"""Task of every published checkpoint."""


def header_of(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Header:
    path = Path("wan.safetensors")
    return Header(
        tensors={key: TensorInfo(shape=shape, dtype=torch.bfloat16, file=path) for key, shape in shapes.items()},
        metadata=metadata or {},
        paths=(path,),
    )


def to_diffusers(key: str) -> str:
    """The key of diffusers' WanTransformer3DModel."""
    for old, new in (
        ("head.modulation", "scale_shift_table"),
        ("head.head.", "proj_out."),
        ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
        ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
        ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
        ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
        ("time_projection.1.", "condition_embedder.time_proj."),
        (".self_attn.", ".attn1."),
        (".cross_attn.", ".attn2."),
        (".modulation", ".scale_shift_table"),
        (".norm3.", ".norm2."),
        (".ffn.0.", ".ffn.net.0.proj."),
        (".ffn.2.", ".ffn.net.2."),
        (".q.", ".to_q."),
        (".k.", ".to_k."),
        (".v.", ".to_v."),
        (".o.", ".to_out.0."),
    ):
        key = key.replace(old, new)
    return key
