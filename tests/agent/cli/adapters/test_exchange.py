"""An adapter that somebody trained elsewhere must do here what it did there, or be refused before it reaches an arm.

Pinned, with peft itself on the other side: equal outputs in and out, ranks and scales of patterns included; dtypes cast
with a word about it, on float32 and bfloat16 bases; own exports come back under their id; and the code of each folder
that is refused, with nothing stored. Deterministic: seeded weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet_sim import registry
from ratchet_vla.adapters.exchange import NOTE
from ratchet_vla.adapters.peft_format import CONFIG, PICKLED, WEIGHTS
from ratchet_vla.adapters.protocol import Provenance
from ratchet_vla.adapters.store.folder import FolderStore
from ratchet_vla.cli import common
from ratchet_vla.cli.main import main
from ratchet_vla.policy.checkpoints import adopted
from ratchet_vla.policy.checkpoints import own as checkpoint
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.runtime.inference.server import open_prismatic
from tests.agent.policy import samples
from tests.agent.policy.checkpoints.test_adopted import STATED
from tests.agent.policy.checkpoints.test_openvla import LIBERO
from tests.agent.policy.checkpoints.test_openvla import folder as folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("base")
    checkpoint.save(samples.policy(), made / "base")
    return made / "base"


def logits(policy: Any) -> torch.Tensor:
    """What the policy answers to three observations, action logits before any rounding to bins."""
    with torch.no_grad():
        return policy.logits(samples.batch(policy)).float()  # type: ignore[no-any-return]


def of_peft(base: Path, out: Path, std: float = 0.1, **options: Any) -> torch.Tensor:
    """A folder that peft saved of this base, and what peft's own layers answer."""
    policy = adopted.load(base)
    assert isinstance(policy, PrismaticPolicy)
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj", "lm_head"], **options}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(policy.network, peft.LoraConfig(**given))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(str(out), save_embedding_layers=False)
    policy.network = model.base_model.model.eval()
    return logits(policy)


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> dict[str, Any]:
    assert main(["adapters", *map(str, words), "--json"]) == code
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def running(base: Path, store: Path, reference: str, suite: str = "metaworld") -> torch.Tensor:
    """What an adapter of a store answers, opened as every verb opens it."""
    there = FolderStore(store)
    shape = common.lora_of(there, reference)
    opened = common.open_running(base, registry.contract_for(suite), shape, there)
    return logits(opened.serve(there.resolve(reference)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_rslora": True},
        {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
        {"target_modules": r".*layers\.0\..*(k|v)_proj"},
    ],
    ids=["plain", "rslora", "patterns", "regex"],
)
def test_what_peft_saved_runs_here_and_what_is_here_runs_in_peft(
    base: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = of_peft(base, tmp_path / "theirs", **options)
    store = tmp_path / "store"
    words = ["--policy", base, "--store", store, "--task", "door-open", "--tag", "candidate"]
    facts = told(capsys, "import", tmp_path / "theirs", *words)
    assert facts["notes"] == []
    card = FolderStore(store).card("candidate")
    assert (card.id, card.provenance.task, card.provenance.stage) == (facts["id"], "door-open", 1)
    assert card.provenance.effect == facts["effect"] > 0
    torch.testing.assert_close(running(base, store, "candidate"), theirs, atol=2e-5, rtol=1e-5)
    # The policy's own process opens it, too.
    options = {"policy": str(base), "store": str(store), "adapter": "candidate", "image_fit": "crop_resize"}
    served = open_prismatic(options, registry.contract_for("metaworld"))
    assert served.adapter_id == facts["id"]

    told(capsys, "export", "candidate", tmp_path / "out", "--store", store)
    fresh = adopted.load(base)
    assert isinstance(fresh, PrismaticPolicy)
    fresh.network = peft.PeftModel.from_pretrained(fresh.network, str(tmp_path / "out")).base_model.model.eval()
    torch.testing.assert_close(logits(fresh), theirs, atol=2e-5, rtol=1e-5)


def test_own_exports_come_back_under_their_id_with_what_was_known(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_peft(base, tmp_path / "theirs")
    first = told(capsys, "import", tmp_path / "theirs", "--policy", base, "--store", tmp_path / "one")
    one = FolderStore(tmp_path / "one")
    one.annotate(first["id"], {"gate/door-open": 0.5})
    told(capsys, "export", first["id"], tmp_path / "out", "--store", one.root)
    again = told(capsys, "import", tmp_path / "out", "--policy", base, "--store", tmp_path / "two")
    assert again["id"] == first["id"]
    two = FolderStore(tmp_path / "two")
    assert two.card(again["id"]).provenance == one.card(first["id"]).provenance
    assert told(capsys, "export", first["id"], tmp_path / "out", "--store", one.root, code=2)["error"]["code"] == (
        "adapter.exists"
    )


def test_dtypes_are_cast_with_a_word_about_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = of_peft(base, tmp_path / "theirs")
    first = told(capsys, "import", tmp_path / "theirs", "--policy", base, "--store", tmp_path / "one")
    out = told(capsys, "export", first["id"], tmp_path / "half", "--store", tmp_path / "one", "--dtype", "bfloat16")
    assert out["notes"][0].startswith("cast from float32 to bfloat16, which changed weights by up to 0.")
    assert {t.dtype for t in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.bfloat16}
    back = told(
        capsys, "import", tmp_path / "half", "--policy", base, "--store", tmp_path / "one", "--dtype", "float32"
    )
    assert back["notes"] == ["cast from bfloat16 to float32, exactly"]
    assert back["id"] != first["id"]
    torch.testing.assert_close(running(base, tmp_path / "one", back["id"]), theirs, atol=0.1, rtol=0.02)

    # Half precision has no room for large values; nothing is written then.
    big = {n: t * 1e6 for n, t in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    save_file(big, tmp_path / "theirs" / WEIGHTS)
    words = ["--policy", base, "--store", tmp_path / "three", "--dtype", "float16"]
    assert told(capsys, "import", tmp_path / "theirs", *words, code=2)["error"]["code"] == "adapter.cast_overflow"
    assert not (tmp_path / "three").exists()


def test_a_float32_adapter_runs_on_a_bfloat16_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT's default: the base in bfloat16, the adapter trained in float32."""
    base = tmp_path / "base"
    adopted.adopt(folder, LIBERO, dataclasses.replace(STATED, dtype="bfloat16"), base)
    theirs = of_peft(base, tmp_path / "theirs")
    assert {t.dtype for t in load_file(tmp_path / "theirs" / WEIGHTS).values()} == {torch.float32}
    words = ["--policy", base, "--store", tmp_path / "store"]
    facts = told(capsys, "import", tmp_path / "theirs", *words)
    mine = running(base, tmp_path / "store", facts["id"], "libero_object")
    assert float((mine - theirs).norm() / theirs.norm()) < 0.01
    narrow = told(capsys, "import", tmp_path / "theirs", *words, "--dtype", "bfloat16")
    assert narrow["notes"][0].startswith("cast from float32 to bfloat16")
    mine = running(base, tmp_path / "store", narrow["id"], "libero_object")
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / PICKLED)


def _extra(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if "layers.0" in n).replace("layers.0", "layers.9")
    save_file({**tensors, name: torch.zeros(3, 32)}, folder / WEIGHTS)


def _embedding(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "base_model.model.embed_tokens.weight": torch.zeros(3, 32)}, folder / WEIGHTS)


def _missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS)


def _shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if "lora_A" in n)
    save_file({**tensors, name: torch.zeros(3, 31)}, folder / WEIGHTS)


def _nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, next(iter(tensors)): next(iter(tensors.values())) * float("nan")}, folder / WEIGHTS)


def _dora(folder: Path) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, "use_dora": True}))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (_pickled, "adapter.pickled", "executes code"),
        (_extra, "adapter.extra_keys", "layers.9"),
        (_embedding, "adapter.extra_keys", "embed_tokens"),
        (_missing, "adapter.missing_keys", "are missing"),
        (_shape, "adapter.wrong_shape", "(3, 31)"),
        (_nan, "adapter.not_finite", "NaN"),
        (_dora, "adapter.unsupported_config", "use_dora"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_stored(  # type: ignore[no-untyped-def]
    base: Path, tmp_path: Path, change, code: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    of_peft(base, tmp_path / "theirs")
    change(tmp_path / "theirs")
    words = ["--policy", base, "--store", tmp_path / "store"]
    error = told(capsys, "import", tmp_path / "theirs", *words, code=2)["error"]
    assert (error["code"], says in error["what"]) == (code, True)
    assert error["fix"]
    assert not (tmp_path / "store").exists()


def test_the_wrong_base_is_called_so(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_peft(base, tmp_path / "theirs")
    checkpoint.save(samples.policy(seed=1), tmp_path / "other")
    store = ["--store", tmp_path / "store"]
    facts = told(capsys, "import", tmp_path / "theirs", "--policy", base, *store)
    told(capsys, "export", facts["id"], tmp_path / "out", *store)
    again = ["import", tmp_path / "out", *store]
    assert told(capsys, *again, "--policy", tmp_path / "other", code=2)["error"]["code"] == "adapter.wrong_base"
    # A base itself in the adapter's place, and a folder that was changed after the export.
    assert told(capsys, "import", base, "--policy", base, *store, code=2)["error"]["code"] == "adapter.is_base"
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    save_file({n: t * 2 for n, t in tensors.items()}, tmp_path / "out" / WEIGHTS)
    assert told(capsys, *again, "--policy", base, code=2)["error"]["code"] == "adapter.hash_mismatch"
    (tmp_path / "out" / NOTE).unlink()
    found = told(capsys, *again, "--policy", base)
    assert FolderStore(tmp_path / "store").card(found["id"]).provenance == Provenance(
        effect=found["effect"], notes="imported from out"
    )
