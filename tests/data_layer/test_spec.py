"""The dataset file: the reference cases in their decided form, and one clear report for every kind of fault."""

import json
from pathlib import Path

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.data.spec import load, parse

CASES = json.loads((Path(__file__).parents[1] / "data/reference/behaviour/dataset.json").read_text(encoding="utf-8"))[
    "config"
]
BY_NAME = {case["name"]: case for case in CASES}

ACCEPTED = [case["name"] for case in CASES if case.get("datasets") and case["name"] != "no directory"]
REFUSED = {
    "unknown key": "[[datasets]] 1: foo is not a known key",
    "video key in general": "[general]: target_frames belongs in [[datasets]]",
    "cache_directory in general": "[general]: cache_directory belongs in [[datasets]]",
    "three element resolution": "resolution = [1, 2, 3]: [width, height] or one whole number is needed",
    "float resolution": "resolution = [960.0, 544]: a whole number is needed",
    "image and video keys": "image_directory and video_directory exclude each other",
    # the established tool takes these three and then has nothing to train on
    "no directory": "[[datasets]] 1: names no pictures or clips",
    "no datasets": "no [[datasets]] section",
    "empty datasets": "no [[datasets]] section",
}


def test_every_reference_case_is_asserted():
    assert set(ACCEPTED) | set(REFUSED) | {"int fps"} == set(BY_NAME)


@pytest.mark.parametrize("name", ACCEPTED)
def test_reference_values(name):
    case = BY_NAME[name]
    config = parse(case["toml"], Path("data.toml"))
    assert len(config.datasets) == len(case["datasets"])
    for spec, expected in zip(config.datasets, case["datasets"], strict=True):
        params = expected["params"]
        assert spec.kind == expected["kind"]
        for key in ("enable_bucket", "bucket_no_upscale", "caption_extension", "batch_size", "num_repeats"):
            assert getattr(spec, key) == params[key], key
        assert list(spec.resolution) == params["resolution"]
        assert spec.cache_directory == (Path(params["cache_directory"]) if params["cache_directory"] else None)
        assert str(spec.media) == (params[f"{spec.kind}_directory"] or params[f"{spec.kind}_jsonl_file"])
        control = params["control_directory"]
        assert spec.control_directory == (Path(control) if control else None)
        if spec.kind == "image":
            assert spec.no_resize_control == params["no_resize_control"]
            size = params["control_resolution"]
            assert spec.control_resolution == (tuple(size) if size else None)
            assert spec.multiple_target == params["multiple_target"]
            assert spec.fp_1f_target_index == params["fp_1f_target_index"]
            assert spec.fp_1f_no_post == params["fp_1f_no_post"]
            indices = params["fp_1f_clean_indices"]
            assert spec.fp_1f_clean_indices == (tuple(indices) if indices else None)
        assert spec.fp_latent_window_size == params["fp_latent_window_size"]
        if spec.kind == "video":
            assert list(spec.target_frames) == params["target_frames"]
            for key in ("frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps"):
                assert getattr(spec, key) == params[key], key


@pytest.mark.parametrize(("name", "sentence"), REFUSED.items())
def test_reference_faults(name, sentence):
    with pytest.raises(UserError) as caught:
        parse(BY_NAME[name]["toml"], Path("data.toml"))
    assert str(caught.value).startswith("data.toml: ")
    assert sentence in str(caught.value)


def test_a_whole_frame_rate_is_a_number_too():
    assert parse(BY_NAME["int fps"]["toml"], Path("data.toml")).datasets[0].source_fps == 30.0


def test_older_spellings_warn_and_the_present_one_wins():
    config = parse(BY_NAME["both keys"]["toml"], Path("data.toml"))
    assert config.datasets[0].control_resolution == (1024, 1024)
    assert config.warnings == (
        "data.toml, [[datasets]] 1: qwen_image_edit_control_resolution is now called control_resolution",
    )


def test_all_faults_come_at_once_with_section_value_and_hint():
    text = """
    [general]
    resolution = "512"
    enable_buckets = true
    [[datasets]]
    image_directory = "/d"
    num_repeat = 3
    batch_size = 0
    frame_stride = 2
    [[datasets]]
    image_jsonl_file = "/d/list.jsonl"
    caption_extension = "txt"
    [[datasets]]
    video_directory = "/v"
    frame_extraction = "slides"
    enable_bucket = "yes"
    """
    with pytest.raises(UserError) as caught:
        parse(text, Path("data.toml"))
    first, *rest = str(caught.value).splitlines()
    assert first == "data.toml has 9 faults:"
    assert [line.strip() for line in rest] == [
        '[general]: resolution = "512": [width, height] or one whole number is needed',
        "[general]: enable_buckets is not a known key: did you mean enable_bucket?",
        "[[datasets]] 1: num_repeat is not a known key: did you mean num_repeats?",
        "[[datasets]] 1: batch_size = 0: must be 1 or more",
        "[[datasets]] 1: frame_stride is for video datasets only",
        '[[datasets]] 2: caption_extension = "txt": must start with a dot, e.g. ".txt"',
        "[[datasets]] 2: image_jsonl_file needs a cache_directory: a list of files has no folder of its own",
        '[[datasets]] 3: frame_extraction = "slides": use one of head, chunk, slide, uniform, full;'
        " did you mean 'slide'?",
        '[[datasets]] 3: enable_bucket = "yes": true or false is needed, without quotes',
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[general\n", "data.toml cannot be parsed: "),
        ("resolution = 512\n[[datasets]]\nimage_directory='/d'", "resolution stands outside [general]"),
        ("[datasets]\nimage_directory='/d'", "[[datasets]] a list of tables, in double brackets"),
        ("[[datasets]]\nimage_dir='/d'", "video_jsonl_file; did you mean image_directory by image_dir?"),
        ("datasets = [1]", "[[datasets]] 1: a table is needed"),
    ],
)
def test_a_malformed_file_is_one_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        parse(text, Path("data.toml"))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_and_a_byte_order_mark_are_read():
    content = json.dumps({"general": {"resolution": 64}, "datasets": [{"image_directory": "/d"}]})
    assert parse("\ufeff" + content, Path("data.json")).datasets[0].resolution == (64, 64)


class TestFolders:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "data.toml"
        path.write_text(text, encoding="utf-8")
        return path

    def test_missing_things_are_named_with_the_working_folder(self, tmp_path):
        path = self.write(
            tmp_path,
            '[[datasets]]\nimage_directory = "nowhere"\n'
            '[[datasets]]\nvideo_jsonl_file = "no.jsonl"\ncache_directory = "c"',
        )
        with pytest.raises(UserError) as caught:
            load(path)
        assert '[[datasets]] 1: image_directory = "nowhere" is not there (working folder ' in str(caught.value)
        assert '[[datasets]] 2: video_jsonl_file = "no.jsonl" is not there' in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.toml is not there: check --dataset_config"):
            load(tmp_path / "none.toml")

    def test_relative_paths_are_the_working_folders_first_then_the_files(self, tmp_path, monkeypatch):
        (tmp_path / "set" / "pictures").mkdir(parents=True)
        path = self.write(tmp_path / "set", '[[datasets]]\nimage_directory = "pictures"\ncache_directory = "cache"')
        monkeypatch.chdir(tmp_path)
        beside = load(path).datasets[0]
        assert beside.directory == tmp_path / "set" / "pictures"
        assert beside.cache_folder == tmp_path / "set" / "cache"
        (tmp_path / "pictures").mkdir()
        here = load(path).datasets[0]
        assert here.directory == Path("pictures")
        assert here.cache_folder == Path("cache")

    def test_two_datasets_with_one_cache_folder_are_refused(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        text = "".join(
            f'[[datasets]]\nimage_directory = "{tmp_path / name}"\ncache_directory = "{tmp_path / "cache"}"\n'
            for name in ("a", "b")
        )
        with pytest.raises(UserError, match=r"\[\[datasets\]\] 2: keeps its caches in .* like \[\[datasets\]\] 1"):
            load(self.write(tmp_path, text))

    def test_missing_media_are_accepted_where_caches_are_enough(self, tmp_path):
        (tmp_path / "cache").mkdir()
        text = f'[[datasets]]\nimage_directory = "{tmp_path / "gone"}"\ncache_directory = "{tmp_path / "cache"}"\n'
        path = self.write(tmp_path, text)
        with pytest.raises(UserError, match="gone"):
            load(path)
        assert load(path, need_media=False).datasets[0].cache_folder == tmp_path / "cache"
