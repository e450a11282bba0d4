"""What older releases that the package allows cannot do by themselves; tests that need it are skipped with them."""

from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


# (package, the first release that can, why not before, names of tests)
BEFORE: list[tuple[str, str, str, tuple[str, ...]]] = [
    (
        "torch",
        "2.9",
        "FSDP 2 over gloo adds gradients of processes up, where it should average them",
        (
            "test_distributed.py::*[[]fsdp2*",
            "test_distributed.py::test_values_on_the_first_process_alone",
            "test_sharded.py::test_two_processes",
            "test_kernels.py::test_two_processes_train_as_one[[]fsdp*",
            "test_launch.py::test_a_configuration_file[[]fsdp2]",
            "test_kernels.py::test_two_processes_train_as_one[[]bfloat16]",
        ),
    ),
    (
        "torch",
        "2.9",
        "torch does not tell what autograd keeps: inputs that could be made again are kept",
        (
            "test_kernels.py::test_an_input_that_its_graph_can_make_again_is_not_kept*",
            "test_kernels.py::test_a_sparse_update_keeps_no_matrix*",
            "test_kernels.py::test_layers_that_read_one_input_transform_it_once_in_the_backward_pass",
            "test_kernels.py::test_a_small_spectrum_keeps_nothing_as_large_as_the_weight*",
            "test_less_kept.py::*",
            "test_savings.py::*",
        ),
    ),
    (
        "torch",
        "2.9",
        "estimates of a step's memory are about an eighth low",
        ("test_memory.py::test_the_estimate_is_what_is_measured*",),
    ),
    ("torch", "2.9", "torch compiles no training step of a wrapped model", ("test_kernels.py::test_compiles_*",)),
    (
        "torch",
        "2.9",
        "torch has no grouped product of matrices on CPUs, by which transformers computes experts",
        (
            "*[[]mixtral*]",
            "*[[]deepseek*]",
            "test_weight_conversion.py::test_adapters_of_modules_act_on_the_stacked_parameters*",
            "test_weight_conversion.py::test_a_peft_model_of_experts_is_saved_and_loaded",
            "test_weight_conversion.py::test_modules_of_different_ranks",
            "test_weight_conversion.py::test_transformers_adds_an_adapter_to_experts",
        ),
    ),
    (
        "torchao",
        "0.18",
        "int8 weights of torchao are of another class, which cannot be made anew from dense ones",
        (
            "test_quantized_laws.py::test_merging_rounds_as_reported*-torchao-int8]",
            "test_starts.py::test_on_quantised_bases*-torchao-int8]",
            "test_quantized.py::test_a_weight_whose_class_cannot_be_made_anew_is_named",
            "test_quantized.py::test_training_through_weights_of_torchao_that_round_their_inputs_is_warned_of*",
        ),
    ),
    (
        "transformers",
        "5.12",
        "Trainers of transformers before 5.12 compute losses otherwise",
        (
            "clients/test_transformers.py::TestTrainer::*",
            "test_distributed.py::test_the_trainer*",
            "test_many.py::test_together_is_one_after_another",
        ),
    ),
    (
        "transformers",
        "5.12",
        "load_adapter of transformers before 5.12 loses copies, trained tokens and magnitudes, with 0.21.2 too",
        (
            "clients/test_transformers.py::TestFiles::*loads_into_a_model*",
            "test_weight_conversion.py::test_transformers_loads_and_saves_adapters*",
        ),
    ),
    (
        "transformers",
        "5.12",
        "transformers has no such model, name or attention function before",
        (
            "*::TestAdaptionPrompt::*[[]gptj]",
            "test_file_rules.py::test_files_and_configs_with_names_of_older_versions*",
            "test_file_rules.py::test_names_from_before_the_language_model_moved*",
            "test_prompts.py::*[[]gemma4-*",
            "test_blocks.py::test_a_cache_that_was_filled_without_the_shadow_is_refused",
            "test_distributed.py::*[[]tp]",
            "test_distributed.py::test_processes_start_from_one_adapter",
            "test_computed_weights.py::test_the_code_of_a_class_tells_whose_weight_it_reads",
            "test_mtl_lora.py::*[[]vit]",
            "test_threads.py::test_blocks_can_be_traced_and_exported",
        ),
    ),
]


def _is_before(package: str, release: str) -> bool:
    try:
        return Version(version(package)) < Version(release)
    except PackageNotFoundError:
        return False


LACKING = [entry for entry in BEFORE if _is_before(*entry[:2])]


def reason(name: str) -> str | None:
    """Why a test cannot pass with what is installed; None where it can."""
    for package, _, why, patterns in LACKING:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return f"{package} {version(package)}: {why}"
    return None
