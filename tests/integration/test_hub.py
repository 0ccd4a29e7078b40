"""Folders of ours in a process that never imported this package, as transformers loads them from the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import thoughtformer
from prose import tiny_pair
from thoughtformer.hub import MODEL_AUTO_MAP, TOKENIZER_AUTO_MAP
from thoughtformer.models.loading import ASSETS, BUNDLED

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "thoughtformer" not in sys.modules or sys.modules["thoughtformer"] is None
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = tokenizer("It was late. The old man", return_tensors="pt")
print(model.dtype, tokenizer.model_max_length, model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist())
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


def run(code, *arguments, tmp_path):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_a_saved_folder_loads_anywhere(tmp_path):
    model, tokenizer = tiny_pair()
    model.float().save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not hasattr(model.config, "auto_map"), "it is the folder's"
    done = run(LOAD, tmp_path / "saved", tmp_path / "again", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    inputs = tokenizer("It was late. The old man", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist()
    assert done.stdout.split(maxsplit=2)[2].strip() == str(expected)
    # What was loaded so saves the same, and none of this package's source.
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == sorted(
        file.name for file in (tmp_path / "saved").iterdir()
    )
    again = (tmp_path / "again" / "modeling_thoughtformer.py").read_text()
    assert again == (tmp_path / "saved" / "modeling_thoughtformer.py").read_text()
    assert len(again) < 1000


def test_without_the_package_it_says_how_to_get_it(tmp_path):
    model, tokenizer = tiny_pair()
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    code = "import sys\nsys.modules['thoughtformer'] = None\n" + LOAD
    done = run(code, tmp_path / "saved", tmp_path / "again", tmp_path=tmp_path)
    assert done.returncode != 0
    assert "pip install thoughtformer" in done.stderr


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_folders_say_what_they_are(name, tmp_path):
    folder = ASSETS / name
    assert json.loads((folder / "config.json").read_text())["auto_map"] == MODEL_AUTO_MAP
    assert json.loads((folder / "tokenizer_config.json").read_text())["auto_map"] == TOKENIZER_AUTO_MAP
    done = run(LOAD, folder, tmp_path / "again", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    dtype, longest, ids = done.stdout.split(maxsplit=2)
    model, tokenizer = thoughtformer.load(name)
    inputs = tokenizer("It was late. The old man", return_tensors="pt")
    assert (dtype, longest) == ("torch.float32", "1024")
    assert ids.strip() == str(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0].tolist())
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 1024
    assert len(tokenizer("It was late. " * 900, truncation=True)["input_ids"]) == 1024
