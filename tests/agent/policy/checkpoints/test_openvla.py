"""OpenVLA and the published variants of OpenVLA-OFT: one token after another, regression head, state, several images.

The path matters because users bring these checkpoints. Pinned: logits and tokens that the libraries of the published
code compute (tests/golden/openvla), the regression head's numbers, that it is refused for learning with its reason, how
state and statistics are read, bfloat16 in memory, and every broken folder's code. Determinism: fixed files, float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ratchet_vla.contract import RobotContract, compatibility
from ratchet_vla.errors import RatchetError
from ratchet_vla.learner.rollouts.collection import run_episodes
from ratchet_vla.learner.rollouts.specs import EpisodeSpec
from ratchet_vla.policy.checkpoints import openvla as published
from ratchet_vla.policy.checkpoints.weights import read_headers, read_weights
from ratchet_vla.policy.discrete.policy import PrismaticPolicy
from ratchet_vla.policy.images import Preparation
from ratchet_vla.policy.protocol import Policy, PolicyInput
from ratchet_vla.testing.conformance.policy import PolicyConformance, rows, uniform
from tests.agent.policy import samples

LIBERO = RobotContract.load(samples.ROOT / "robots/libero.yaml")
STATE = ("eef_position", "eef_rotation", "gripper")
GOLDEN = load_file(samples.ROOT / "tests/golden/openvla/autoregressive.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden weights as a user has them: configuration, weights, tokenizer."""
    made = tmp_path_factory.mktemp("openvla")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(samples.GOLDEN / name, made)
    (made / "tokenizer.json").write_text(samples.TOKENIZER.to_str())
    return made


def load(folder: Path, **changes: Any) -> PrismaticPolicy:
    options: dict[str, Any] = {
        "attention": "causal",
        "contract": LIBERO,
        "cameras": ["agentview"],
        "decoding": "autoregressive",
        "images": Preparation(),
    }
    return published.load(folder, **{**options, **changes})


def broken(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    made = shutil.copytree(folder, tmp_path / "broken")
    if change is not None:
        raw = json.loads((made / "config.json").read_text())
        change(raw)
        (made / "config.json").write_text(json.dumps(raw))
    return made


# One token after another.


@pytest.mark.parametrize(("dtype", "goal"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_tokens_and_logits_are_the_published_ones(folder: Path, dtype: str, goal: float) -> None:
    policy = load(folder)
    io = load_file(samples.GOLDEN / "io.safetensors")
    pixels = io["pixel_values"].reshape(3, 1, 6, 56, 56)
    ids, mask = io["input_ids"], io["attention_mask"].bool()
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor, _: int) -> torch.Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    with policy.computing_in(dtype), policy.autocast():
        tokens, _ = policy.network.one_by_one(pixels, ids, mask, None, policy.compute_dtype, choose)
        assert torch.equal(tokens, GOLDEN["tokens"])
        error = (torch.stack(seen, 1) - GOLDEN["logits"]).norm() / GOLDEN["logits"].norm()
        assert float(error) < goal
        # In one forward over given tokens, as the learner computes it.
        hidden = policy.hidden_states(pixels, ids, mask, given=tokens)
        again = policy.action_logits(hidden)
        assert float(((again - GOLDEN["logits"]).norm() / GOLDEN["logits"].norm()).detach()) < goal


class TestAutoregressive(PolicyConformance):
    """One action per chunk, and each token depends on those before it."""

    @pytest.fixture
    def policy(self, folder: Path) -> PrismaticPolicy:
        return load(folder)

    @pytest.fixture
    def batch(self, policy: PrismaticPolicy) -> PolicyInput:
        return samples.batch(policy)

    def test_probabilities_of_all_bins_sum_to_one(self, policy: Policy, batch: PolicyInput) -> None:
        """Over the bins of one token, given those before it."""
        assert isinstance(policy, PrismaticPolicy)
        tokens = policy.predict(batch).tokens
        assert tokens is not None
        for index in (0, 3, 6):
            given = tokens[:1].repeat(256, 1, 1)
            given[:, 0, index] = torch.arange(256)
            with torch.no_grad():
                log_prob, _ = policy.log_prob(rows(batch, [0] * 256), given, 1.6)
            assert float(log_prob[:, 0, index].exp().sum()) == pytest.approx(1.0, abs=1e-4)

    def test_a_token_depends_on_those_before_it_alone(self, policy: PrismaticPolicy, batch: PolicyInput) -> None:
        tokens = policy.sample(batch, 1.0, uniform(policy, len(batch))).tokens
        assert tokens is not None
        before, _ = policy.log_prob(batch, tokens, 1.0)
        changed = tokens.clone()
        changed[:, 0, 3] = (tokens[:, 0, 3] + 100) % 256
        after, _ = policy.log_prob(batch, changed, 1.0)
        assert torch.equal(after[:, 0, :3], before[:, 0, :3])
        assert bool((after[:, 0, 4:] != before[:, 0, 4:]).any())


def test_the_parts_of_a_configuration_must_agree(folder: Path) -> None:
    with pytest.raises(RatchetError) as refused:
        load(folder, attention="bidirectional")
    assert refused.value.code == "policy.bad_config"
    assert load(folder).spec.chunk == 1
    assert load(folder).base_hash != load(folder, decoding="parallel").base_hash


def test_bfloat16_stays_bfloat16_in_memory(folder: Path) -> None:
    plain, half = load(folder), load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in plain.network.parameters()} == {torch.float32}
    raw = json.loads((folder / "config.json").read_text())
    assert raw["dtype"] == "float32"  # the default above is the file's
    batch = samples.batch(half)
    whole = half.base_hash
    for name in ("bfloat16", "float32"):
        with half.computing_in(name):
            assert bool(half.predict(batch).actions.isfinite().all())
        assert {p.dtype for p in half.network.parameters()} == {getattr(torch, name)}
        half.base_changed()
        assert half.base_hash == whole  # it counts what was stored, not what memory holds


# OpenVLA-OFT's regression head and state.


def with_parts(folder: Path, tmp_path: Path, state: int = 8) -> Path:
    made = shutil.copytree(folder, tmp_path / "oft")
    head = {f"module.{k.removeprefix('l1.')}": v for k, v in GOLDEN.items() if k.startswith("l1.model.")}
    torch.save(head, made / "action_head--150000_checkpoint.pt")
    generator = torch.Generator().manual_seed(0)
    sizes = {"fc1.weight": (32, state), "fc1.bias": (32,), "fc2.weight": (32, 32), "fc2.bias": (32,)}
    torch.save(
        {f"module.{k}": torch.randn(s, generator=generator) * 0.5 for k, s in sizes.items()},
        made / "proprio_projector--150000_checkpoint.pt",
    )
    raw = json.loads((made / "config.json").read_text())["norm_stats"]
    raw["libero_spatial_no_noops"]["proprio"] = {
        "q01": [-0.5] * 6 + [0.0, -0.04],
        "q99": [0.5] * 6 + [0.04, 0.0],
    }
    (made / "dataset_statistics.json").write_text(json.dumps(raw))
    return made


def oft(folder: Path, **changes: Any) -> PrismaticPolicy:
    return load(folder, **{"decoding": "parallel", "attention": "bidirectional", "state": STATE, **changes})


def test_the_regression_head_is_the_published_one(folder: Path, tmp_path: Path) -> None:
    policy = oft(with_parts(folder, tmp_path))
    actions = policy.network.action_head(GOLDEN["l1.hidden"])
    expected = GOLDEN["l1.actions"]
    assert float(((actions - expected).norm() / expected.norm()).detach()) < 1e-5
    assert policy.spec.bins == 0
    batch = samples.batch(policy)
    chunks = policy.predict(batch)
    assert chunks.tokens is None
    assert chunks.log_prob is None
    assert chunks.actions.shape == (3, 8, 7)
    assert bool(chunks.actions.isfinite().all())
    assert compatibility(policy.spec, LIBERO) == []


def test_the_regression_head_is_refused_for_learning(folder: Path, tmp_path: Path) -> None:
    policy = oft(with_parts(folder, tmp_path))
    batch = samples.batch(policy)
    noise = torch.rand(3, 8, 7)
    for call in (
        lambda: policy.sample(batch, 1.0, noise),
        lambda: policy.log_prob(batch, noise.long(), 1.0),
        lambda: policy.logits(batch),
    ):
        with pytest.raises(RatchetError) as refused:
            call()
        assert refused.value.code == "policy.no_probabilities"
        assert "without probabilities" in refused.value.what
    # And before an episode starts.
    with pytest.raises(RatchetError) as refused:
        run_episodes(policy, None, [EpisodeSpec("t", "go", 0, 5, 0)], temperature=1.0)  # type: ignore[arg-type]
    assert refused.value.code == "policy.no_probabilities"


def test_the_state_enters_as_published(folder: Path, tmp_path: Path) -> None:
    policy = oft(with_parts(folder, tmp_path))
    raw = torch.tensor([[0.0, 0.25, -0.5, 0.5, 2.0, -2.0, 0.02, -0.04]])
    expected = torch.tensor([[0.0, 0.5, -1.0, 1.0, 1.0, -1.0, 0.0, -1.0]])
    assert policy.normalised_state(raw) == pytest.approx(expected, abs=1e-5)
    batch = samples.batch(policy)
    before = policy.predict(batch).actions
    assert batch.state is not None
    batch.state = batch.state * 0.1
    assert not torch.allclose(policy.predict(batch).actions, before)
    # It stands behind the images and before the words.
    pixels, ids, mask, state = policy.inputs(batch)
    prefix, seen = policy.network.prefix(pixels, ids, mask, state, torch.float32)
    token = policy.network.state_projector(state)
    patches = policy.network.vision_backbone.patches
    assert torch.equal(prefix[:, 1 + patches], token)
    assert seen.shape[1] == prefix.shape[1]


@pytest.mark.parametrize("state", [(), ("eef_position",), ("nothing",)])
def test_a_state_that_is_not_the_checkpoints_is_refused(folder: Path, tmp_path: Path, state: tuple[str, ...]) -> None:
    with pytest.raises(RatchetError) as refused:
        oft(with_parts(folder, tmp_path), state=state)
    assert refused.value.code == "policy.wrong_state"


def test_two_images_go_in(folder: Path) -> None:
    policy = load(folder, cameras=["agentview", "wrist"])
    batch = samples.batch(policy)
    assert policy.predict(batch).actions.shape == (3, 1, 7)
    with pytest.raises(RatchetError) as refused:
        policy.predict(PolicyInput(torch.as_tensor(batch.images)[:, :1], None, batch.instructions))
    assert refused.value.code == "policy.bad_input"


def test_statistics_beside_the_weights_win_and_every_suite_has_its_own(folder: Path, tmp_path: Path) -> None:
    made = broken(folder, tmp_path)
    stats = json.loads((made / "config.json").read_text())["norm_stats"]["libero_spatial_no_noops"]
    other = json.loads(json.dumps(stats))
    other["action"]["q99"][0] = 0.123
    (made / "dataset_statistics.json").write_text(
        json.dumps({"libero_object": other, "libero_spatial_no_noops": stats})
    )
    assert load(made, statistics_key="libero_object").statistics.q99[0] == pytest.approx(0.123 * 0.05)
    with pytest.raises(RatchetError) as refused:
        load(made, statistics_key="bridge_orig")
    assert refused.value.code == "policy.missing_statistics"
    assert "libero_object, libero_spatial_no_noops" in refused.value.fix


# Broken folders.


def test_a_diffusion_head_and_film_are_refused(folder: Path, tmp_path: Path) -> None:
    made = broken(folder, tmp_path)
    (made / "noisy_action_projector--5_checkpoint.pt").write_bytes(b"")
    with pytest.raises(RatchetError) as refused:
        load(made)
    assert refused.value.code == "policy.unsupported"


def test_a_pickle_that_is_more_than_tensors_is_refused(folder: Path, tmp_path: Path) -> None:
    made = with_parts(folder, tmp_path)
    torch.save({"fc": Path("x")}, made / "action_head--150000_checkpoint.pt")
    with pytest.raises(RatchetError) as refused:
        oft(made)
    assert refused.value.code == "policy.bad_checkpoint"
    shutil.copy(made / "proprio_projector--150000_checkpoint.pt", made / "proprio_projector--2_checkpoint.pt")
    with pytest.raises(RatchetError) as refused:
        oft(made)
    assert refused.value.code == "policy.bad_checkpoint"


def test_missing_shards_are_counted(folder: Path, tmp_path: Path) -> None:
    made = broken(folder, tmp_path)
    (made / "model.safetensors").unlink()
    names = {"a": "model-00001-of-00003.safetensors", "b": "model-00002-of-00003.safetensors"}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file({"a": torch.zeros(1)}, made / names["a"])
    for read in (load, read_headers, read_weights):
        with pytest.raises(RatchetError) as refused:
            read(made)
        assert refused.value.code == "policy.missing_shards"
        assert "1 of 2" in refused.value.what


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for read in (load, read_headers):
        with pytest.raises(RatchetError) as refused:
            read(tmp_path)
        assert refused.value.code == "policy.is_adapter"


def test_whole_numbers_are_not_weights(folder: Path, tmp_path: Path) -> None:
    made = broken(folder, tmp_path)
    tensors = load_file(made / "model.safetensors")
    name = "language_model.lm_head.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, made / "model.safetensors")
    for read in (load, read_headers):
        with pytest.raises(RatchetError) as refused:
            read(made)
        assert refused.value.code == "policy.wrong_dtype"


def test_a_vocabulary_of_another_size_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RatchetError) as refused:
        load(broken(folder, tmp_path, lambda raw: raw["text"].update(vocab_size=32128)))
    assert refused.value.code == "policy.wrong_vocabulary"


def test_statistics_of_another_robot_are_named(folder: Path) -> None:
    metaworld = RobotContract.load(samples.ROOT / "robots/metaworld.yaml")
    with pytest.raises(RatchetError) as refused:
        load(folder, contract=metaworld, cameras=["corner2"])
    assert refused.value.code == "policy.wrong_statistics"


def test_no_network_is_one_line_with_what_to_download() -> None:
    with pytest.raises(RatchetError) as refused:
        published.read("openvla/openvla-7b", attention="causal", contract=LIBERO, cameras=["agentview"])
    assert refused.value.code == "policy.not_downloaded"
    assert "hf download openvla/openvla-7b" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(RatchetError) as refused:
        published.read("/no/such/place", attention="causal", contract=LIBERO, cameras=["agentview"])
    assert refused.value.code == "policy.no_checkpoint"


def test_a_hub_id_in_the_cache_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--openvla--tiny" / "snapshots" / "abc"
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "models--openvla--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load("openvla/tiny").base_hash == load(folder).base_hash  # type: ignore[arg-type]
