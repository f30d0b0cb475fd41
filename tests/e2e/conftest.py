"""A whole tiny Wan on disk: transformer, VAE, umt5 and tokenizer in their original layouts, pictures with captions."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from golden_data import golden
from tiny_models import tiny_dit

WORDS = ("red", "roof", "temple", "flower", "petal", "of", "a", "the")


@dataclass(frozen=True)
class Workshop:
    """Paths of one user's folder."""

    root: Path

    @property
    def dit(self) -> Path:
        return self.root / "dit.safetensors"

    @property
    def vae(self) -> Path:
        return self.root / "vae.safetensors"

    @property
    def t5(self) -> Path:
        return self.root / "t5.safetensors"

    @property
    def data(self) -> Path:
        return self.root / "data.toml"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def caching(self) -> list[str]:
        """Arguments of the latent cache script."""
        return ["--dataset_config", str(self.data), "--vae", str(self.vae), "--device", "cpu"]

    def text(self) -> list[str]:
        """Arguments of the text cache script."""
        return ["--dataset_config", str(self.data), "--t5", str(self.t5), "--device", "cpu"]

    def training(self, name: str, *more: str) -> list[str]:
        """Arguments of the training script: a LoRA on FP8 weights, as the README has it."""
        words = f"""--task t2v-1.3B --dit {self.dit} --dataset_config {self.data} --sdpa --mixed_precision bf16
            --fp8_base --fp8_scaled --optimizer_type AdamW --learning_rate 1e-2 --gradient_checkpointing
            --network_module networks.lora_wan --network_dim 4 --network_alpha 4 --timestep_sampling shift
            --discrete_flow_shift 3.0 --max_train_epochs 2 --save_every_n_epochs 1 --seed 42
            --max_data_loader_n_workers 0 --output_dir {self.out} --output_name {name}"""
        return [*words.split(), *more]

    def generation(self, folder: Path, *more: str) -> list[str]:
        """Arguments of the generation script."""
        words = f"""--task t2v-1.3B --dit {self.dit} --vae {self.vae} --t5 {self.t5} --video_size 32 32
            --infer_steps 3 --seed 5 --guidance_scale 3 --save_path {folder} --device cpu"""
        return [*words.split(), "--prompt", "a red roof", *more]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """The folder, made once; tests write to names of their own."""
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    _save_models(shop)
    _save_pictures(shop.root / "pictures")
    shop.data.write_text(
        f"""
[general]
resolution = [64, 48]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true

[[datasets]]
image_directory = "{(shop.root / "pictures").as_posix()}"
cache_directory = "{shop.cache.as_posix()}"
num_repeats = 2
""",
        encoding="utf-8",
    )
    return shop


def _save_models(shop: Workshop) -> None:
    dit = tiny_dit("wan", text_dim=32, text_len=16)
    weights = {key: value.bfloat16() for key, value in dit.state_dict().items()}
    save_file(weights, shop.dit, {"musubi.config": json.dumps({"num_heads": 2, "text_len": 16})})
    case = golden("wan_vae_a")
    sizes = {name: case.config[name] for name in ("dim_mult", "num_res_blocks", "temporal_downsample")}
    save_file(case.weights, shop.vae, {"musubi.config": json.dumps(sizes)})
    save_file(golden("wan_umt5_a").weights, shop.t5)
    _save_tokenizer(shop.root / "tokenizer")


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i for i, word in enumerate(WORDS, 3)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    tokenizer.save_pretrained(str(folder))


def _save_pictures(folder: Path) -> None:
    """Crops of scikit-learn's two photographs, in two shapes, so that two buckets appear."""
    folder.mkdir()
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    crops = [
        (china, (0, 0, 400, 300), "the red roof of a temple"),
        (china, (200, 100, 500, 325), "a temple"),
        (flower, (100, 50, 500, 350), "a red flower"),
        (flower, (150, 20, 390, 340), "the petal of a flower"),
        (china, (50, 40, 290, 360), "a roof"),
    ]
    for i, (photo, box, caption) in enumerate(crops):
        photo.crop(box).save(folder / f"picture {i}.png")
        (folder / f"picture {i}.txt").write_text(caption, encoding="utf-8")
