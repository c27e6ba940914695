"""What other libraries and papers call the keys of recipes, and what is different here."""

import re
from collections.abc import Sequence
from typing import NamedTuple

SHOWN_NAMES = 4


class KeyAlias(NamedTuple):
    """A setting, or a method that settings choose, under the names that other libraries give it.

    Attributes:
        names: as TRL, verl, OpenRLHF, slime, prime-rl and papers write it, without a section or
            dashes before it.
        keys: the settings for it here.
        note: what differs, or what is done instead.
        page: where docs explain it."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    note: str = ""
    page: str = ""


def _alias(names: str, keys: str = "", note: str = "", page: str = "") -> KeyAlias:
    return KeyAlias(tuple(names.split(", ")), tuple(keys.split()), note, page)


ALIASES = (
    # the rollout
    _alias(
        "num_generations, rollout.n, n_samples_per_prompt, rollouts_per_example, group size, "
        "samples per prompt, n responses",
        "rl.group_size",
    ),
    _alias(
        "rollout_batch_size, train_batch_size, data.train_batch_size, generation_batch_size, "
        "prompts per step, batch size",
        "rl.prompts_per_rollout rl.group_size rl.minibatches",
        "a rollout has prompts_per_rollout x group_size responses, and minibatches updates",
    ),
    _alias(
        "max_new_tokens, max_tokens, max_completion_length, max_response_length, generate_max_len, "
        "rollout_max_response_len, response length, max_gen_len",
        "rollout.max_response_tokens",
    ),
    _alias(
        "max_prompt_length, prompt_max_len, max_model_len, seq_len, context length, max_length",
        "rollout.max_model_len",
        "longer questions are left out and counted",
    ),
    _alias(
        "vllm_gpu_memory_utilization, gpu_memory_utilization, mem_fraction_static",
        "rollout.gpu_memory",
    ),
    _alias(
        "vllm_tensor_parallel_size, tensor_model_parallel_size, rollout_num_gpus_per_engine, tp",
        "rollout.tensor_parallel parallel.tensor",
        "engines and trainer each have their own",
    ),
    _alias("vllm_num_engines, num_engines, replicas, rollout workers", "rollout.engines"),
    _alias(
        "colocate, vllm_mode, colocate_all_models, free_cache_engine, hybrid engine, sleep mode, "
        "enable_sleep_mode",
        "rollout.colocated",
        page="engines.md",
    ),
    _alias("temperature, sampling temperature", "rollout.temperature eval.temperature"),
    _alias(
        "7B on 8 GPUs, one node, single node, 8xH100, 8 GPUs, small cluster",
        "parallel.processes rollout.engines",
        "a recipe: examples/one_node/qwen2.5-7b.yaml; megatron-r1 plan RECIPE says what fits",
        "plan.md",
    ),
    # rewards and data
    _alias(
        "reward_funcs, custom_reward_function, compute_score, remote_rm_url, custom_rm_path, "
        "rm_type, reward function, verifier, rubric",
        "data.kind rewards.weights rewards.options",
        "module:function; functions written for TRL and verl are called as there",
        "rewards.md",
    ),
    _alias("reward_weights, reward shaping, reward scale", "rewards.weights"),
    _alias(
        "reward_model.ground_truth, ground_truth, label_key, answer_key, prompt_key, input_key, "
        "column names",
        "data.columns",
        page="init.md",
    ),
    _alias(
        "system prompt, apply_chat_template, chat template, prompt_template, input_template",
        "data.template",
        page="init.md",
    ),
    _alias(
        "answer extraction, boxed, last number, answer format, math_verify",
        "rewards.reading",
        page="rewards.md",
    ),
    _alias("kl_reward, use_kl_in_reward, apply_kl_to_reward", "rl.algorithm rl.kl_beta",
           "rloo, reinforce_pp and ppo have KL in the reward, the others in the loss",
           "algorithms.md"),
    # the loss
    _alias(
        "kl_coef, beta, kl_loss_coef, init_kl_coef, kl_ctrl.kl_coef, use_kl_loss, kl penalty, "
        "kl_beta",
        "rl.kl_beta",
        page="algorithms.md",
    ),
    _alias("KL-free, no KL, without KL, no reference model, kl_coef 0", "rl.kl_beta",
           "0: no penalty, and no reference is kept", "algorithms.md"),
    _alias("kl_loss_type, kl_estimator, low_var_kl, k1, k2, k3, unbiased KL, "
           "use_bias_correction_kl", "rl.kl_estimator"),
    _alias("sync_ref_model, ref_model_sync_steps, ref_update_steps, reference model update",
           "rl.reference_refresh"),
    _alias(
        "epsilon, clip_ratio, eps_clip, cliprange, clip range, epsilon_low, clip_ratio_low",
        "rl.clip_low rl.clip_high",
    ),
    _alias("epsilon_high, clip_ratio_high, eps_clip_high, clip higher", "rl.clip_high"),
    _alias("clip_ratio_c, dual clip, delta", "rl.dual_clip"),
    _alias("entropy_coeff, entropy_coef, entropy_loss_coef, entropy bonus", "rl.entropy_coef"),
    _alias(
        "loss_agg_mode, loss_type, token-level loss, seq-mean-token-mean, token-mean, length bias, "
        "loss normalization",
        "rl.loss_average",
    ),
    _alias(
        "scale_rewards, norm_adv_by_std_in_grpo, std normalization, advantage normalization, "
        "whiten_rewards",
        "rl.advantage_std",
    ),
    _alias(
        "adv_estimator, advantage_estimator, GRPO, PPO, RLOO, REINFORCE++, DAPO, GSPO, Dr. GRPO, "
        "CISPO",
        "rl.algorithm",
        page="algorithms.md",
    ),
    _alias("GDPO, multi-reward normalization, multi_objective_aggregation, normalize_then_sum",
           "rl.reward_normalization", page="algorithms.md"),
    _alias("importance_sampling_level, sequence-level ratio", "rl.ratio_level"),
    _alias("lambd, lam, gae lambda, gamma, discount", "rl.gae_lambda rl.discount"),
    _alias("filter_groups, dynamic_filtering, dynamic_sampling_filter_path, dynamic sampling, "
           "zero variance groups, zero_std", "rl.dynamic_sampling rl.dynamic_sampling_rounds"),
    _alias(
        "overlong filtering, mask_truncated_completions, mask truncated, truncated responses",
        "rl.truncated",
        "mask: they are left out of the loss; rl.overlong_buffer penalizes them softly",
        "algorithms.md",
    ),
    _alias("overlong_buffer, soft overlong punishment, length penalty", "rl.overlong_buffer",
           page="algorithms.md"),
    _alias(
        "TIS, truncated importance sampling, tis_imp_ratio_cap, use_tis, tis_clip, rollout_is, "
        "vllm_importance_sampling_correction, vllm_importance_sampling_cap, "
        "enable_vllm_is_correction",
        "rl.importance_cap",
        "each token's weight is π_old / π_engine, at most the cap",
        "push.md",
    ),
    _alias(
        "MIS, masked importance sampling, rollout_rs, icepop, seq-mask-tis, geometric mask, DPPO, "
        "dppo_tv, rejection of tokens",
        "rl.engine_mask rl.engine_mask_low rl.engine_mask_high",
        page="algorithms.md",
    ),
    _alias(
        "mismatch, training-inference mismatch, logprob diff, rollout_probs_diff, off-policy "
        "correction",
        "rl.importance_cap rl.engine_mask rl.routing_replay push.probe_tolerance",
        "logprob_diff of metrics.jsonl measures it on every step",
        "push.md",
    ),
    _alias("R3, routing replay, router replay, use_rollout_routing_replay", "rl.routing_replay",
           page="routing_replay.md"),
    _alias(
        "async, asynchronous, max_async_level, max_off_policy_steps, off-policy steps, "
        "one-step off, partial rollout, partial_rollout, staleness_threshold",
        "rl.staleness",
        page="engines.md",
    ),
    # the run
    _alias(
        "ppo_mini_batch_size, global_batch_size, steps_per_generation, mini batch, "
        "updates per rollout",
        "rl.minibatches",
        "a number of mini-batches, not their size",
    ),
    _alias(
        "num_iterations, ppo_epochs, mu, inner epochs",
        "rl.minibatches",
        "every response is trained on once: one inner epoch, as in R1",
    ),
    _alias(
        "per_device_train_batch_size, gradient_accumulation_steps, micro_train_batch_size, "
        "ppo_micro_batch_size_per_gpu, ppo_max_token_len_per_gpu, max_tokens_per_gpu, "
        "use_dynamic_bsz, micro batch",
        "parallel.tokens_per_microbatch",
    ),
    _alias("gradient_checkpointing, activation checkpointing, recompute", "parallel.recompute"),
    _alias(
        "max_steps, num_train_epochs, total_epochs, total_training_steps, num_rollout, "
        "num_episodes, epochs",
        "run.steps sft.epochs",
        "rl counts rollouts",
    ),
    _alias("warmup_steps, warmup_ratio, lr_warmup_steps, lr_warmup", "optimizer.warmup_updates",
           "a number of optimizer steps"),
    _alias("lr, actor_learning_rate, optim.lr", "optimizer.learning_rate"),
    _alias("lr_scheduler_type, lr_decay_style, cosine", "optimizer.decay"),
    _alias("max_grad_norm, clip_grad, gradient clipping, max_norm", "optimizer.clip_grad"),
    _alias("save_steps, save_freq, save_interval, ckpt_interval", "checkpoint.every"),
    _alias("save_total_limit, max_actor_ckpt_to_keep, max_ckpt_num", "checkpoint.keep"),
    _alias("resume_from_checkpoint, resume_mode, load_checkpoint, resume",
           "checkpoint.verify", "the same command continues a run", "checkpoints.md"),
    _alias("eval_steps, test_freq, eval_interval, val_before_train", "eval.every",
           "rl evaluates before the first step, too"),
    _alias(
        "pass@1 on AIME, AIME, AIME 2024, MATH-500, GPQA, LiveCodeBench, benchmark",
        "eval.benchmarks eval.samples",
        "megatron-r1 eval: pass@1 is the mean over eval.samples responses",
        "evaluation.md",
    ),
    _alias("maj@k, cons@64, majority vote, self-consistency", "eval.samples", page="evaluation.md"),
    _alias("report_to, wandb, wandb_project, tensorboard, mlflow, logger, use_wandb",
           "run.trackers run.project", page="trackers.md"),
    _alias("output_dir, default_local_dir, save_path, ckpt_path", "run.folder"),
    _alias("pretrain, model_name_or_path, hf_checkpoint, actor_rollout_ref.model.path",
           "model.path"),
    _alias("n_gpus_per_node, nnodes, world size, num_gpus, actor_num_gpus_per_node",
           "parallel.processes", page="slurm.md"),
    _alias("ZeRO, zero_stage, FSDP, deepspeed, distributed optimizer",
           "parallel.processes parallel.optimizer_offload",
           "Megatron's distributed optimizer is always on: moments are spread over data ranks",
           "parallelism.md"),
    _alias("adam_offload, optimizer_offload, cpu offload, param_offload, offload_train",
           "parallel.offload_between_phases parallel.optimizer_offload parallel.reference_offload"),
    _alias("peft, use_peft, lora_rank, lora_alpha, QLoRA", "model.lora", page="lora.md"),
    _alias("lora.merge, enable_lora, max_lora_rank, LoRARequest", "push.adapter_only",
           page="lora.md"),
    _alias("multi_turn, tool use, agent loop, environment, tools",
           "agents.environment agents.max_turns", page="agents.md"),
    _alias("best of n, rejection sampling, RFT", "sample.samples sample.keep.choose",
           page="sample.md"),
    _alias("knowledge distillation, GKD, OPD, teacher", "teacher.path", page="distillation.md"),
    _alias(
        "MOPD, multi-teacher, teacher_model_configs", "teacher.by_source", page="distillation.md"
    ),
    _alias("ray, ray start, placement group, num_nodes", "rollout.placement",
           "there is no Ray: torchrun or Slurm start a run", "slurm.md"),
)  # fmt: skip


def find_aliases(text: str, *, exact: bool = False) -> list[KeyAlias]:
    """Return the rows that have `text` as a name, else those with a name that has its words.

    `exact` leaves out the latter. Case, dashes, underscores and a path of sections before the name
    do not count."""
    for plain_text in (_normalize_name(text), _normalize_name(text.rpartition(".")[2])):
        if rows := [alias for alias in ALIASES if plain_text in map(_normalize_name, alias.names)]:
            return rows
    if exact or not (words := _normalize_name(text)):
        return []
    return [
        a for a in ALIASES if any(f" {words} " in f" {_normalize_name(name)} " for name in a.names)
    ]


def describe_aliases(rows: Sequence[KeyAlias]) -> str:
    """Return a line per row: its first names, keys, note and page."""
    lines = []
    for row in rows:
        names = ", ".join(row.names[:SHOWN_NAMES]) + (", …" if len(row.names) > SHOWN_NAMES else "")
        parts = [", ".join(row.keys), row.note, row.page and f"docs/{row.page}"]
        lines.append(f"# {names}: {'; '.join(filter(None, parts))}")
    return "\n".join(lines)


def _normalize_name(name: str) -> str:
    return " ".join(re.sub(r"[-_.\s]+", " ", name).casefold().split())
