"""Patches of other objects: listed in one module, undone together."""

import ast
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader

from hf_fwdattr import ResponseCallback
from hf_fwdattr.trainer import patching
from hf_fwdattr.trainer.patching import Patches, find_train_call
from tests.helpers.cases import adapted
from tests.helpers.runs import base, config, trainer_for, training_set


def test_undo_restores_attributes_and_hooks_in_reverse_order() -> None:
    class Target:
        def method(self) -> str:
            return "class"

    target, model, patches = Target(), nn.Linear(1, 1), Patches()
    loader: Any = DataLoader([1, 2])  # type: ignore[arg-type]
    patches.replace(target, method=lambda: "once", other=1)
    patches.replace(target, method=lambda: "twice")
    patches.replace(loader, dataset=[3])
    patches.hook(model.register_forward_hook(lambda *_: None))
    assert (target.method(), loader.dataset) == ("twice", [3])
    for _ in range(2):
        patches.undo()
        assert target.method() == "class"
        assert vars(target) == {}
        assert loader.dataset == [1, 2]
        assert not model._forward_hooks


@pytest.mark.parametrize("added", [False, True])
def test_training_leaves_the_listed_patches_only(tmp_path: Path, added: bool) -> None:
    callback = ResponseCallback(config())
    trainer = trainer_for(tmp_path, adapted(base()), training_set(), None if added else callback)
    if added:
        callback.add_to(trainer)
    trainer.train()
    model: Any = trainer.model
    stand_ins = {name for name, value in vars(trainer).items() if type(value).__module__.startswith("hf_fwdattr")}
    assert stand_ins == {"create_model_card", "push_to_hub"} | ({"train"} if added else set())
    assert not {"clip_grad_norm_", "clip_grad_value_"} & set(vars(trainer.accelerator))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    for name in ("create_model_card", "push_to_hub", "train"):
        assert f"`{name}`" in str(patching.__doc__)


def test_there_is_no_train_call_outside_a_trainer() -> None:
    assert find_train_call() == (None, None)


# Objects of others, by the names that our modules call them.
FOREIGN = {"trainer", "accelerator", "loader", "dataloader", "model", "optimizer"}


@pytest.mark.parametrize("path", sorted(Path(patching.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_only_patching_sets_attributes_of_other_objects(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            assert owner not in FOREIGN, ast.unparse(node)
        if isinstance(node, ast.Attribute) and node.attr in ("__setattr__", "__delattr__"):
            assert path.stem == "patching"
