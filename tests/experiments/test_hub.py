"""What `--push_to_hub` uploads, with the Hub replaced where requests would leave this machine."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from llava_sculpt.artifacts.model_card import upload_results, write_model_card


class Hub:
    """Keeps what `HfApi` would send: names of uploaded files, per upload."""

    def __init__(self) -> None:
        self.repositories: list[str] = []
        self.uploads: list[dict[str, str]] = []

    def create_repo(self, api: HfApi, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        self.repositories.append(repo_id)
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, api: HfApi, *, repo_id: str, folder_path: str | Path, **options: Any) -> None:
        assert repo_id.startswith("someone/")
        found = {}
        for file in sorted(Path(folder_path).rglob("*")):
            name = str(file.relative_to(folder_path))
            allowed = options.get("allow_patterns") or ["*"]
            refused = options.get("ignore_patterns") or []
            wanted = any(fnmatch.fnmatch(name, p) for p in allowed)
            if file.is_file() and wanted and not any(fnmatch.fnmatch(name, p) for p in refused):
                found[name] = file.read_text(errors="replace")
        self.uploads.append(found)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda api, *args, **kwargs: hub.create_repo(api, *args, **kwargs))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **kwargs: hub.upload_folder(api, **kwargs))
    return hub


def test_a_finished_run_is_uploaded_whole(train, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "my-run"
    assert train(folder, max_steps=6, save_steps=2, push_to_hub=True, hub_token="hf_secret") == 0
    assert hub.repositories == ["my-run"]
    (uploaded,) = hub.uploads
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "connector.safetensors",
        "sculpt_masks.safetensors",
        "run.json",
    } <= uploaded.keys()
    assert not any("checkpoint" in name or "optimizer" in name or name.startswith(".") for name in uploaded)
    assert json.loads(uploaded["run.json"])["status"] == "finished"
    assert not any("hf_secret" in content for content in uploaded.values())

    entry = {"n": 4, "split": "test", "metric": "accuracy", "variant": "official", "score": 12.345}
    entry |= {"prompt_style": "short", "decoding": "greedy"}
    results = {"tasks": {"iconqa": entry}, "source": 50.0, "target": 12.345, "avg": 31.1725}
    write_model_card(folder, results, "THE TABLE")
    (folder / "results.json").write_text(json.dumps(results))
    upload_results(folder)
    assert set(hub.uploads[1]) == {"README.md", "results.json"}
    card = ModelCard.load(folder / "README.md")
    scores = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    assert scores == {"iconqa": 12.35, "source": 50.0, "target": 12.35, "avg": 31.17}
    assert "base_model" not in card.data.to_dict()  # a folder here, nothing the Hub knows
    assert "THE TABLE" in card.text and "Density: A 9." in card.text
    assert "hf_secret" not in card.content and str(tmp_path) not in card.content


def test_without_the_flag_nothing_is_sent(train, hub: Hub, tmp_path: Path) -> None:
    assert train(tmp_path / "run", max_steps=2, sculpt_warmup_steps=1) == 0
    upload_results(tmp_path / "run")
    assert hub.uploads == hub.repositories == []


def test_uploads_during_training_are_refused(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", push_to_hub=True, hub_strategy="every_save") == 2
    assert "hub_strategy" in capsys.readouterr().err
