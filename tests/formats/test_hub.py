"""What is a hub id, and a hub that does not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopmdm import LoopMDM
from loopmdm.data.tokenizer import load_tokenizer
from loopmdm.formats import hub


@pytest.mark.parametrize(
    ("text", "with_owner", "bare"),
    [
        ("owner/name", True, True),
        ("owner/some-model_1.0", True, True),
        ("name", False, True),
        ("runs/last", False, False),  # runs is a folder here
        ("./owner/name", False, False),
        ("../name", False, False),
        ("/owner/name", False, False),
        ("~/name", False, False),
        ("owner/name/", False, False),
        ("a/b/c", False, False),
        ("owner\\name", False, False),
        ("", False, False),
    ],
)
def test_what_can_be_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, with_owner: bool, bare: bool
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (hub.is_hub_id(text), hub.is_hub_id(text, owner=False)) == (with_owner, bare)


@pytest.mark.parametrize("load", [LoopMDM.from_pretrained, LoopMDM.from_mdlm, load_tokenizer])
def test_a_slip_in_a_path_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    """`runs/lsat` beside `runs/last` is a path; the hub would be asked for half a minute."""
    client = pytest.importorskip("huggingface_hub")
    (tmp_path / "runs" / "last").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(client, "hf_hub_download", asked)
    monkeypatch.setattr(hub, "unreachable", asked)
    with pytest.raises(FileNotFoundError, match="'runs/lsat'"):
        load("runs/lsat")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client retries for half a minute; then only the copies kept from before are looked at."""
    client = pytest.importorskip("huggingface_hub")
    asked: list[dict[str, Any]] = []

    def download(*_: Any, **options: Any) -> str:
        asked.append(options)
        raise OSError("not in the cache")

    monkeypatch.setattr(client, "hf_hub_download", download)
    monkeypatch.setattr(hub, "unreachable", lambda: "https://hub: no route")
    message = r"not a local folder, and config\.json could not be fetched from the hub: it cannot be reached"
    with pytest.raises(FileNotFoundError, match=message + r" \(https://hub: no route\)"):
        LoopMDM.from_pretrained("owner/name")
    assert asked == [{"local_files_only": True}]


def test_unreachable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub")
    heads: list[float] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            heads.append(timeout)
            raise OSError(f"no route to {url}")

    monkeypatch.setattr(client.utils, "get_session", Session)
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client.constants, "ENDPOINT", "https://hub")
    assert hub.unreachable() == "https://hub: no route to https://hub"
    assert heads == [5.0]
    monkeypatch.setattr(Session, "head", lambda *_, **__: None)
    assert hub.unreachable() is None
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
