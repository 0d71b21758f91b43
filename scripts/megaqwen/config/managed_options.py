"""Megatron's options that a config may not set under `train`, and what to do instead.

Three kinds: what the model's config.json decides, what this pipeline sets itself, and what has no
part in its training. Refusing the last kind keeps a config honest: nothing in it is read and then
ignored.
"""

from collections.abc import Mapping
from typing import Any

MODEL = "it comes from the model's config.json: choose the model under `model`"
DROPOUT = "Qwen is trained without dropout: the model's config.json says so"
PATHS = "the run's own directories are used: set `run` and `results`"
DATA = "it comes from the `data` section: set corpora, weights, split or seed there"
DATASETS = "documents are packed into samples in one way: text joined by end-of-document tokens"
EVALUATION = "a validation draws from the corpora by their weights: eval_iters says how much"
TOKENIZER = "the model's own tokenizer is used: text is tokenized by preprocess"
CHECKPOINTS = "checkpoints are written and resumed as torch_dist in one way, which export reads"
RETAINED = "checkpoints.keep_every and keep_last say which stay: the newest whole one always does"
TRACKED = "the `tracking` section says where curves go, so that naming a place trains nothing again"
LOGGED = "each iteration's figures are kept: metrics.jsonl, alarms and curves are made of them"
LAUNCH = "the launcher and the machine decide it"
SIGNALS = "training always saves and stops when it is told to: the profile chooses the signal"
FAULTS = (
    "training ends, and says so, at a loss or a gradient that is no number: nothing is done twice"
)
ITERATIONS = "training is counted in iterations: use train_iters, lr_decay_iters, lr_warmup_iters"
BATCHES = "every iteration has global_batch_size samples"
DEPRECATED = "Megatron calls it deprecated or no longer reads it"
OTHER = "it has no part in this training of a Qwen language model"

BY_NAME: dict[str, str] = {
    MODEL: """
        num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size kv_channels
        num_attention_heads num_query_groups group_query_attention layernorm_epsilon normalization
        layernorm_zero_centered_gamma add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm swiglu
        openai_gelu squared_relu quick_geglu glu_linear_offset activation_func_clamp_value
        apply_residual_connection_post_layernorm attention_output_gate softmax_type
        position_embedding_type use_rotary_position_embeddings add_position_embedding rope_type
        rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor
        use_rope_scaling rope_scaling_factor no_rope_freq mrope_section
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        yarn_correction_range_round_to_int mscale mscale_all_dim rotary_scaling_factor
        relative_attention_num_buckets relative_attention_max_distance max_position_embeddings
        window_size window_attn_skip_freq untie_embeddings_and_output_weights
        vocab_size padded_vocab_size pad_vocab_size make_vocab_size_divisible_by vocab_extra_ids
        init_method_std embedding_init_method_std init_method_xavier_uniform perform_initialization
        num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_num_groups
        moe_router_group_topk moe_router_pre_softmax moe_router_topk_scaling_factor
        moe_router_score_function moe_router_enable_expert_bias moe_router_bias_update_rate
        moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size
        moe_apply_probs_on_input moe_use_upcycling moe_upcycling_granularity
        moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size""",
    DROPOUT: "hidden_dropout attention_dropout",
    PATHS: """
        save load pretrained_checkpoint tensorboard_dir data_cache_path wandb_save_dir
        non_persistent_global_ckpt_dir non_persistent_local_ckpt_dir ckpt_convert_save
        config_logger_dir""",
    DATA: """
        data_path train_data_path valid_data_path test_data_path data_args_path
        per_split_data_args_path per_dataset_sequences_path split mock_data sample_rate
        phase_transition_iterations multiple_validation_sets validation_set_names
        dataloader_type""",
    DATASETS: """
        reset_position_ids reset_attention_mask eod_mask_loss dataloader_inter_document_masking
        create_attention_mask_in_dataloader encoder_seq_length decoder_seq_length
        num_dataset_builder_threads mmap_bin_files object_storage_cache_path
        mid_level_dataset_surplus allow_ambiguous_pad_tokens dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap mask_prob short_seq_prob sft sft_tokenizer_prompt_format
        hybrid_context_parallel max_seqlen_per_dp_cp_rank""",
    EVALUATION: "full_validation",
    CHECKPOINTS: """
        ckpt_format auto_detect_ckpt_format ckpt_convert_format ckpt_step finetune
        ckpt_convert_update_legacy_dist_opt_format use_checkpoint_args override_ckpt_iteration
        use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args
        exit_on_missing_checkpoint no_save_optim no_save_rng no_load_optim no_load_rng
        load_main_params_from_ckpt dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable
        strict_fsdp_dtensor_load dist_ckpt_strictness non_persistent_ckpt_type
        verify_integrity
        non_persistent_save_interval non_persistent_local_ckpt_algo replication replication_jump
        replication_factor async_strategy use_persistent_ckpt_worker async_ckpt_use_cpu_shm""",
    RETAINED: "save_retain_interval",
    FAULTS: "result_rejected_tracker_filename",
    TRACKED: "wandb_project wandb_exp_name wandb_entity",
    LOGGED: "tensorboard_log_interval",
    LAUNCH: """
        distributed_backend local_rank lazy_mpu_init fake_process_group transformer_impl
        use_cpu_initialization use_gloo_process_groups""",
    SIGNALS: """
        exit_signal_handler exit_signal exit_signal_handler_for_dataloader
        exit_signal_handler_for_training""",
    ITERATIONS: "train_samples lr_decay_samples lr_warmup_samples lr_wsd_decay_samples",
    BATCHES: "step_batch_size_schedule decrease_batch_size_if_needed",
    DEPRECATED: """
        batch_size rampup_batch_size fp8_interval warmup model_parallel_size
        checkpoint_activations recompute_activations
        use_flash_attn deprecated_use_mcore_models use_dist_ckpt_deprecated
        dist_ckpt_format_deprecated ckpt_fully_parallel_save_deprecated disable_msc_deprecated
        cuda_graph_scope_deprecated enable_cuda_graph external_cuda_graph moe_layer_recompute
        moe_router_padding_for_fp8 moe_enable_deepep moe_deepep_num_sms hybrid_override_pattern
        mtp_hybrid_override_pattern no_weight_decay_cond_type onnx_safe""",
    OTHER: """
        data_parallel_random_init
        spec yaml_cfg is_hybrid_model hybrid_layer_pattern mamba_state_dim mamba_head_dim
        mamba_num_groups mamba_num_heads use_mamba_mem_eff_path mamba_training_ssm_states_dtype
        multi_latent_attention experimental_attention_variant linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads
        mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads
        mtp_standalone use_mup bert_binary_head flash_decode mlp_chunks_for_prefill
        nccl_all_reduce_for_prefill moe_pad_experts_for_cuda_graph_inference symmetric_ar_type
        inference_rng_tracker skip_train test_mode freeze_all_layers check_for_spiky_loss
        use_megatron_fsdp use_torch_fsdp2 init_model_with_meta_device data_parallel_sharding_strategy
        outer_dp_sharding_strategy enable_full_sharding_in_hsdp keep_fp8_transpose_cache
        suggested_communication_unit_size create_all_gather_group
        tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
        moe_router_quantile_balancing_ema""",
}
BY_PREFIX: dict[str, str] = {
    "tokenizer_": TOKENIZER,
    "fim_": DATASETS,
    "dsa_": OTHER,
    "mup_": OTHER,
    "inference_": OTHER,
    "megatron_fsdp_": OTHER,
    "torch_fsdp2_": OTHER,
    "fsdp_": OTHER,
}
BY_GROUP: dict[str, str] = {
    "tokenizer": TOKENIZER,
    "autoresume": SIGNALS,
    "rerun engine": FAULTS,
    "rl": OTHER,
    "biencoder": OTHER,
    "vision": OTHER,
    "mla": OTHER,
    "experimental_attention_variant": OTHER,
    "heterogeneous architecture": MODEL,
    "Logits Distillation": OTHER,
    "inference": OTHER,
    "In-process restart": OTHER,
    "msc": OTHER,
}
# In a group that is refused, but of use in training.
ALLOWED = {"cuda_graph_modules"}

REASON_BY_NAME = {name: reason for reason, names in BY_NAME.items() for name in names.split()}


def reason_not_to_set(dest: str, option: Mapping[str, Any]) -> str | None:
    """Why a config may not set this option and what to do instead; None where it may.

    Args:
        dest: The option's canonical name.
        option: Its entry in megatron_options.json.
    """
    if dest in ALLOWED:
        return None
    if dest in REASON_BY_NAME:
        return REASON_BY_NAME[dest]
    for prefix, reason in BY_PREFIX.items():
        if dest.startswith(prefix):
            return reason
    return BY_GROUP.get(option["group"])
