"""Parts of other packages that they do not promise, and that we use: named here, missed here first.

Each has a fallback (or a plain error) where it is used. This test fails when one moves, so that the
fallback is a choice and not an accident.
"""

import inspect
import re
from importlib import import_module

import pytest

CONTINUOUS = "transformers.generation.continuous_batching"
PRIVATE_PARTS = [
    # Used by models/local/continuous.py and processors.py; without them rows go in static batches.
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager.add_request"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager.cancel_request"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager.get_result"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager.is_running"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousMixin.init_continuous_batching"),
    (f"{CONTINUOUS}.cb_logits_processors", "ContinuousBatchingLogitsProcessor.prepare_tensor_args"),
    (f"{CONTINUOUS}.cb_logits_processors", "ContinuousBatchingLogitsProcessor.fill_defaults"),
    (f"{CONTINUOUS}.cb_logits_processors", "ContinuousBatchingLogitsProcessorList"),
    # Used by models/local/cache.py: transformers' own cache with roomier layers.
    ("transformers.cache_utils", "DynamicLayer.lazy_initialization"),
    ("transformers.cache_utils", "DynamicLayer.batch_select_indices"),
    # Used by models/chat.py, which renders as `apply_chat_template` does, but within bounds.
    ("transformers.utils.chat_template_utils", "_compile_jinja_template"),
    # Used by models/local/products.py; without them weights stay as they lie.
    ("torch", "ops.mkldnn._reorder_linear_weight"),
    ("torch", "ops.mkldnn._linear_pointwise"),
    # The same: --cpu-int8 is refused without them.
    ("torch", "ops.quantized.linear_prepack"),
    ("torch", "ops.quantized.linear_dynamic"),
    # Used by models/weights.py, to show how far a conversion is; without it, only that it goes on.
    ("transformers.modeling_gguf_pytorch_utils", "tqdm"),
    # Used by training/: overridden in loop.py and dpo.py (who calls them: CALLED_BY_THEMSELVES).
    ("transformers", "Trainer._get_train_sampler"),
    ("transformers", "Trainer._prepare_inputs"),
    ("trl", "DPOTrainer._precompute_ref_logps"),
    ("trl", "DPOTrainer._prepare_dataset"),
    # Not exported by TRL: memory.py, head.py, dpo.py, loop.py (which does without).
    ("trl.trainer.utils", "add_fused_lm_head"),
    ("trl.trainer.utils", "FusedCausalLMOutput"),
    ("trl.trainer.utils", "disable_dropout_in_model"),
    ("trl.trainer.utils", "get_peak_flops"),
    # Of torch, for memory.py: what a step needs is then not known beforehand.
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch.utils._pytree", "tree_map_only"),
    ("torch", "UntypedStorage._cdata"),
    ("torch", "ops.prim.device.default"),
    # Used by models/weights.py, which makes each once a conversion; without them it takes twice as long.
    ("gguf", "GGUFReader"),
    ("gguf", "get_tensor_name_map"),
]
CALLED_BY_THEMSELVES = [
    # Without the first, the order of rows would be transformers' own, and no resume exact.
    ("transformers", "Trainer", "_get_train_sampler"),
    ("trl", "DPOTrainer", "_precompute_ref_logps"),
    ("trl", "DPOTrainer", "_prepare_dataset"),
]
SET_IN_INIT = [
    (f"{CONTINUOUS}.continuous_api", "OutputRouter", "output_queue"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager", "output_router"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager", "logit_processor"),
    (f"{CONTINUOUS}.continuous_api", "ContinuousBatchingManager", "continuous_batching_config"),
    (f"{CONTINUOUS}.cb_logits_processors", "ContinuousBatchingLogitsProcessorList", "tensors_required"),
    ("transformers", "DynamicCache", "layer_class_to_replicate"),
    # Used by training/batches.py: the name under which a resumed dpo finds its rows again.
    ("datasets", "Dataset", "_fingerprint"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "path"), PRIVATE_PARTS)
def test_a_private_part_is_where_we_use_it(module, path):
    part = import_module(module)
    for name in path.split("."):
        part = getattr(part, name)


@pytest.mark.parametrize(("module", "owner", "name"), CALLED_BY_THEMSELVES)
def test_a_private_method_that_we_override_is_still_called(module, owner, name):
    source = inspect.getsource(getattr(import_module(module), owner))
    assert re.search(rf"self\.{name}\b", source)


@pytest.mark.parametrize(("module", "owner", "name"), SET_IN_INIT)
def test_a_private_attribute_is_still_set(module, owner, name):
    classes = inspect.getmro(getattr(import_module(module), owner))
    sources = [inspect.getsource(cls) for cls in classes if cls is not object]
    assert any(f"self.{name}" in source for source in sources)


def test_the_config_of_continuous_batching_takes_what_we_set():
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    taken = set(inspect.signature(ContinuousBatchingConfig).parameters)
    assert taken >= {
        "max_requests_per_batch", "use_cuda_graph", "use_async_batching", "num_blocks",
        "max_batch_tokens", "max_memory_percent", "max_blocks_per_request", "page_size",
    }  # fmt: skip
