"""Options under `train` that change no number of a training: neither a weight nor a sample nor a loss.

How it is watched, timed, saved and stopped may be changed while a training is under way, which goes on
from its last checkpoint, and after it, which redoes nothing. Of these Megatron 0.19.2 reads each only to
log, to write, to wait or to leave its loop. An option is not here if it may choose another kernel or
another order of sums (log_max_attention_logit; use_sharp; save_wgrads_interval, which reduces gradients
whole), draw random numbers (gpu_sniff_test_interval) or decide what becomes of a bad iteration.
"""

NAMES = """
    log_interval log_params_norm log_throughput log_progress log_num_zeros_in_grad log_energy
    log_timers_to_tensorboard log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard
    log_memory_to_tensorboard log_memory_interval log_device_memory_used
    log_world_size_to_tensorboard logging_level tensorboard_queue_size
    timing_log_level timing_log_option barrier_with_L1_time moe_per_layer_logging
    log_straggler straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup
    profile profile_step_start profile_step_end profile_ranks nvtx_ranges record_shapes
    use_pytorch_profiler pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack
    pytorch_profiler_collect_chakra record_memory_history memory_snapshot_path
    distributed_timeout_minutes distributed_timeout_seconds_after_init
    flight_recorder_dump_path flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout
    flight_recorder_include_stack_trace flight_recorder_include_only_active
    flight_recorder_extra_dump_on_exec
    save_interval async_save async_ckpt_cpu_priority async_ckpt_io_priority dist_ckpt_workers
    ckpt_fully_parallel_save ckpt_fully_parallel_save_process_group ckpt_fully_parallel_load
    ckpt_fully_parallel_load_process_group ckpt_fully_parallel_load_exchange_algo
    ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity
    distrib_optim_fully_reshardable_mem_efficient
    exit_interval exit_duration_in_mins
    num_workers train_sync_interval empty_unused_memory_level
    manual_gc manual_gc_interval manual_gc_eval"""
OPERATIONAL = frozenset(NAMES.split())
