"""What every AdapterStore must do. Inherit `StoreSuite` and give the `store` fixture.

A store that loses, mixes up or quietly alters an adapter makes a robot run weights nobody evaluated; each test here is
one promise of `ratchet_vla.adapters.protocol.AdapterStore`.
"""

from __future__ import annotations

import pytest
import torch

from ratchet_vla.adapters.identity import Adapter
from ratchet_vla.adapters.protocol import BASE, AdapterStore, Provenance
from ratchet_vla.errors import RatchetError
from ratchet_vla.testing.tiny_policy import made

__all__ = ["StoreSuite"]


def refused(code: str, call: object, *arguments: object) -> RatchetError:
    with pytest.raises(RatchetError) as refusal:
        call(*arguments)  # type: ignore[operator]
    assert refusal.value.code == code
    assert "\n" not in str(refusal.value)
    return refusal.value


def same(one: Adapter, two: Adapter) -> bool:
    return one.tensors.keys() == two.tensors.keys() and all(
        torch.equal(one.tensors[n], t) for n, t in two.tensors.items()
    )


class StoreSuite:
    """Adapter stores.

    The fixture:

    store: an empty store, in a folder of its own.
    """

    def test_is_an_adapter_store(self, store: AdapterStore) -> None:
        assert isinstance(store, AdapterStore)
        assert store.ids() == []
        assert store.tags() == {}
        assert store.history() == []
        assert store.verify() == []

    def test_what_goes_in_comes_out(self, store: AdapterStore) -> None:
        adapter = made(1)
        provenance = Provenance(None, "open the drawer", 2, {"success": 0.5}, 0.01, "note")
        card = store.put(adapter, provenance)
        assert card.id == adapter.id
        assert store.ids() == [adapter.id]
        back = store.get(adapter.id)
        assert same(back, adapter)
        assert back.id == adapter.id
        assert back.config == adapter.config
        assert store.card(adapter.id) == card
        assert card.provenance == provenance
        assert card.base_hash == adapter.binding.base_hash
        assert card.bytes == adapter.bytes

    def test_putting_twice_changes_nothing(self, store: AdapterStore) -> None:
        first = store.put(made(1), Provenance(task="first"))
        assert store.put(made(1), Provenance(task="second")) == first
        assert store.ids() == [first.id]

    def test_cards_take_measurements_without_changing_the_id(self, store: AdapterStore) -> None:
        name = store.put(made(1), Provenance(metrics={"a": 1.0})).id
        store.annotate(name, {"b": 2.0})
        assert store.card(name).provenance.metrics == {"a": 1.0, "b": 2.0}
        assert store.get(name).id == name
        refused("adapter.bad_card", store.annotate, name, {"c": float("nan")})
        assert store.verify() == []

    def test_references_are_tags_ids_and_unique_beginnings(self, store: AdapterStore) -> None:
        name = store.put(made(1)).id
        store.tag("lab-7.best", name)
        assert [store.resolve(r) for r in ("lab-7.best", name, name[:4], name[:20])] == [name] * 3 + [name]
        refused("adapter.unknown", store.resolve, name[:3])

    def test_unknown_references_name_near_matches(self, store: AdapterStore) -> None:
        name = store.put(made(1)).id
        store.tag("drawer", name)
        assert name[:12] in refused("adapter.unknown", store.get, name[:6] + "zz").fix
        assert "drawer" in refused("adapter.unknown", store.get, "drower").fix
        assert "drawer" in refused("adapter.unknown", store.card, "entirely else").fix

    def test_tags_move_and_remember(self, store: AdapterStore) -> None:
        one = store.put(made(1)).id
        two = store.put(made(2)).id
        store.tag("candidate", one, "first")
        move = store.tag("candidate", two, "better")
        assert (move.old, move.new, move.reason) == (one, two, "better")
        assert store.tags() == {"candidate": two}
        assert [(m.old, m.new) for m in store.history("candidate")] == [(None, one), (one, two)]
        assert store.history("active") == []

    @pytest.mark.parametrize("name", ["", "a b", "../x", ".x", "x" * 65, "ab/c", "deadbeef"])
    def test_bad_tags_are_refused(self, store: AdapterStore, name: str) -> None:
        adapter = store.put(made(1)).id
        refused("adapter.bad_tag", store.tag, name, adapter)
        refused("adapter.unknown", store.tag, "fine", "absent")
        assert store.tags() == {}

    def test_promotion_keeps_the_previous_one_and_rollback_walks_back(self, store: AdapterStore) -> None:
        ids = [store.put(made(seed)).id for seed in (1, 2, 3)]
        refused("adapter.no_previous", store.rollback)
        for name in ids:
            store.promote(name)
        assert store.tags() == {"active": ids[2], "previous": ids[1]}
        assert store.rollback(reason="dropped a cup").new == ids[1]
        assert store.rollback().new == ids[0]
        store.promote(ids[2])
        assert store.rollback().new == ids[0]
        assert [m.action for m in store.history("active")] == ["set"] * 3 + ["rollback"] * 2 + ["set", "rollback"]
        sequences = [m.sequence for m in store.history()]
        assert sequences == sorted(set(sequences))

    def test_the_base_is_active_before_and_has_a_name(self, store: AdapterStore) -> None:
        assert [store.resolve(r) for r in ("active", "previous", BASE)] == [BASE] * 3
        name = store.put(made(1)).id
        store.promote(name)
        assert store.tags() == {"active": name, "previous": BASE}
        assert store.rollback().new == BASE
        assert (store.tags()["active"], store.resolve("active")) == (BASE, BASE)
        refused("adapter.no_previous", store.rollback)
        store.tag("candidate", BASE)
        for call in (store.get, store.card, store.lineage, store.remove):
            refused("adapter.is_base", call, "candidate")
        refused("adapter.bad_tag", store.tag, BASE, name)
        refused("adapter.unknown", store.resolve, "declined")
        assert store.verify() == []
        store.promote(name)
        assert [m.new for m in store.history("active")] == [name, BASE, name]
        assert store.rollback().new == BASE

    def test_tags_set_by_hand_have_a_previous(self, store: AdapterStore) -> None:
        one = store.put(made(1)).id
        two = store.put(made(2)).id
        store.tag("active", one)
        assert store.resolve("previous") == BASE
        store.tag("active", two)
        assert store.resolve("previous") == one

    def test_lineage_follows_parents(self, store: AdapterStore) -> None:
        one = store.put(made(1), Provenance(parent="ee" * 32)).id
        two = store.put(made(2), Provenance(parent=one)).id
        three = store.put(made(3), Provenance(parent=two)).id
        assert store.lineage(three) == [three, two, one]
        problems = store.verify()
        assert [(p.code, p.fatal) for p in problems] == [("adapter.missing_parent", False)]

    def test_removal_spares_what_is_tagged(self, store: AdapterStore) -> None:
        one = store.put(made(1)).id
        two = store.put(made(2)).id
        store.tag("active", one)
        assert "active" in refused("adapter.in_use", store.remove, one).what
        store.remove(two)
        assert store.ids() == [one]
        refused("adapter.unknown", store.get, two)
        assert store.verify() == []
