"""A pytest plugin (``-p tests.support.fake_metal``) under which the library believes that it runs on Metal.

``backend()`` answers "metal" wherever it was imported, so that activations keep the checkpoint's dtype and the Python
paths of a GPU are taken; the references compute, on the CPU. It shows where a GPU's dtypes and paths break Python code,
on machines without one. It says nothing about kernels, and child processes are not told.

Every test must pass so but for those in `EXCLUDED`; at least nine in ten do.
"""

import os

os.environ["FLASH_MOE_REFERENCE"] = "1"  # before any import: the dispatchers ask for it

from fnmatch import fnmatch

import pytest

from flash_moe_mlx.ops.backend import backend

FLOAT32 = "compares float32 logits, tokens or sizes with another implementation's; bfloat16 has other ones"
CHILD = "starts a child process, which computes on the CPU"
CPU = "is about the CPU kernels in the model, which a GPU doesn't run"
OWN_GPU = "puts a GPU of its own in place, with kernels"
SLOW = "has nothing to do with the backend and takes long"

EXCLUDED = {
    "tests/models/test_transformers_parity.py::*": FLOAT32,
    "tests/models/test_mlx_lm_parity.py::*": FLOAT32,
    "tests/models/test_qwen3_next.py::*": FLOAT32,
    "tests/models/test_table_rows.py::test_matches_mlx_lm*": FLOAT32,
    "tests/experts/test_reservations.py::test_caches_that_a_caller_keeps_are_counted": FLOAT32,
    "tests/experts/test_reservations.py::test_what_ended_takes_nothing_*": FLOAT32,
    "tests/planning/test_presets.py::test_figures_*": FLOAT32,
    "tests/server/test_openai_client.py::test_tool_choice": FLOAT32,
    "tests/models/test_layouts.py::test_matches_*": FLOAT32,
    "tests/models/test_layouts.py::test_global_scales_of_mlx": FLOAT32,
    "tests/models/test_modes.py::test_m*": FLOAT32,
    "tests/runtime/test_remote_code.py::test_a_model_file_of_its_own": FLOAT32,
    "tests/models/test_switch_glu.py::test_matches_mlx_lm*": FLOAT32,
    "tests/models/test_switch_glu.py::test_bit_identical_where_the_same_kernels_run*": FLOAT32,
    "tests/models/test_switch_glu.py::test_a_prompt_in_parts_equals_one_pass*": FLOAT32,
    "tests/models/test_switch_glu_loading.py::test_fewer_experts_a_token*": FLOAT32,
    "tests/models/test_switch_glu_loading.py::test_one_tensor_an_expert*": FLOAT32,
    "tests/models/test_switch_glu_loading.py::test_layers_behind_the_models_own_are_skipped": FLOAT32,
    "tests/runtime/test_adapters.py::test_logits_and_tokens_are_mlx_lms*": FLOAT32,
    "tests/runtime/test_adapters.py::test_dora": FLOAT32,
    "tests/runtime/test_adapters.py::test_no_kernel_is_compiled_*": FLOAT32,
    "tests/runtime/test_batches.py::test_padding_reads_nothing": FLOAT32,
    "tests/runtime/test_bit_identity.py::test_another_order_would_be_seen*": FLOAT32,
    "tests/runtime/test_embedding.py::test_states_of_several_generations_are_counted": FLOAT32,
    "tests/planning/test_presets.py::*": FLOAT32,
    "tests/packing/test_repacking.py::test_packed_bit_for_bit*": FLOAT32,
    "tests/packing/test_repacking.py::test_dense_matrices_alone": FLOAT32,
    "tests/runtime/test_generation.py::test_same_tokens_*": FLOAT32,
    "tests/runtime/test_generation.py::test_two_turns_*": FLOAT32,
    "tests/faults/test_table.py::test_bits_are_those_of_a_fresh_process": CHILD,
    "tests/runtime/test_embedding.py::test_offline_from_the_hubs_cache_without_a_warning": CHILD,
    "tests/runtime/test_embedding.py::test_two_models_of_different_sizes_at_once": CHILD,
    "tests/models/test_switch_glu_loading.py::test_limit_holds*": CHILD,
    "tests/models/test_switch_glu.py::test_behaves_as_mlx_lm_expects_of_a_model*": FLOAT32,
    "tests/cli/test_planning.py::test_plan_*": FLOAT32,
    "tests/benchmarks/test_next_layer.py::test_observed_experts_are_those_of_the_engines_trace": FLOAT32,
    "tests/models/test_cpu_decoder.py::*": CPU,
    "tests/models/test_position_logits.py::test_numbers_that_are_not_finite_are_found_in_a_later_block": CPU,
    "tests/lab/test_quality.py::test_steps_predict_as_decoding_does": CPU,
    "tests/planning/test_plan.py::test_this_machine_is_measured": CPU,
    "tests/lab/test_kernel_check.py::test_the_cpus_own_kernels_are_checked_too": CPU,
    "tests/formats/test_schemes.py::test_a_made_up_mode_streams*kernels*": CPU,
    "tests/ops/cpu/test_experts.py::test_a_wave_matches_its_experts*": CPU,
    "tests/ops/cpu/test_experts.py::test_records_anywhere_in_memory*": CPU,
    "tests/ops/cpu/test_threads.py::test_without_numba_the_reference_runs_and_says_so_once": CPU,
    "tests/ops/test_dispatch.py::*": OWN_GPU,
    "tests/models/test_gpu_step.py::*": OWN_GPU,
    "tests/models/test_warm_up.py::*": OWN_GPU,
    "tests/models/test_launches.py::*": OWN_GPU,
    "tests/cli/test_generate.py::test_json_has_usage_and_streaming_figures": CPU,
    "tests/experts/test_distributed.py::*": CHILD,
    "tests/cli/test_chat.py::test_a_c*": CHILD,
    "tests/cli/test_chat.py::test_an_error_ends_the_turn_and_not_the_chat": CHILD,
    "tests/cli/test_chat.py::test_messages_and_tools_through_a_pipe": CHILD,
    "tests/cli/test_generate.py::test_prompt_*": CHILD,
    "tests/cli/test_generate.py::test_raw_*": CHILD,
    "tests/cli/test_generate.py::test_sampling_*": CHILD,
    "tests/cli/test_main.py::test_ctrl_c_*": CHILD,
    "tests/cli/test_serve.py::test_the_python_example": CHILD,
    "tests/cli/test_printable.py::test_standard_input_that_is_no_text_is_refused": SLOW,
    "tests/formats/test_mutated_files.py::*": SLOW,
    "tests/models/test_published.py::*": SLOW,
    "tests/lab/test_plot.py::test_matplotlib_is_imported_when_it_is_used": CHILD,
    "tests/ops/cpu/test_coded.py::test_every_way_to_look_values_up*": SLOW,
    "tests/ops/cpu/test_threads.py::test_choosing_the_kernels_imports_no_numba": SLOW,
    "tests/packing/test_crashes.py::test_killed_at_twenty_moments*": SLOW,
    "tests/packing/test_crashes.py::test_two_packers": SLOW,
    "tests/packing/test_hub.py::*": SLOW,
    "tests/runtime/test_embedding.py::test_interrupted_at_random_moments": SLOW,
    "tests/runtime/test_following.py::*": CHILD,
    "tests/packing/test_pack.py::test_memory_does_not_grow_with_the_model": SLOW,
    "tests/server/test_clients.py::*": SLOW,
    "tests/server/test_answers.py::test_what_is_emitted_can_be_sent_back": SLOW,
    "tests/train_demo/*": SLOW,
    "tests/examples/*": SLOW,
    "tests/test_types.py::*": SLOW,
    "tests/test_installation.py::*": SLOW,
    "tests/test_docs_run.py::*": SLOW,
    "tests/test_forks.py::*": CHILD,
    "tests/test_packaging.py::*": SLOW,
}
"""Patterns of tests that are left out, and why."""

SMALLEST_SHARE = 0.9
"""Of all collected tests, how many must be run."""


def _metal() -> str:
    return "metal"


# Its code and not the name: other modules have imported the function by now.
backend.__code__ = _metal.__code__


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the excluded tests out. Of the whole suite, too many of them or a pattern without a test are errors."""
    left_out = {item: [p for p in EXCLUDED if fnmatch(item.nodeid, p)] for item in items}
    kept = [item for item in items if not left_out[item]]
    if config.args == config.getini("testpaths"):
        share = len(kept) / max(len(items), 1)
        unused = set(EXCLUDED) - {pattern for patterns in left_out.values() for pattern in patterns}
        if share < SMALLEST_SHARE or unused:
            raise pytest.UsageError(
                f"fake Metal must run {SMALLEST_SHARE:.0%} of {len(items)} tests, got {share:.1%}; "
                f"patterns without a test: {sorted(unused)}"
            )
    config.hook.pytest_deselected(items=[item for item in items if left_out[item]])
    items[:] = kept
