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


def _key_alias(names: str, keys: str = "", note: str = "", page: str = "") -> KeyAlias:
    return KeyAlias(tuple(names.split(", ")), tuple(keys.split()), note, page)


ALIASES = (
    # the rollout
    _key_alias(
        "num_generations, rollout.n, n_samples_per_prompt, rollouts_per_example, group size, "
        "samples per prompt, n responses",
        "rl.group_size",
    ),
    _key_alias(
        "rollout_batch_size, train_batch_size, data.train_batch_size, generation_batch_size, "
        "prompts per step, batch size",
        "rl.prompts_per_rollout rl.group_size rl.minibatches",
        "a rollout has prompts_per_rollout x group_size responses, and minibatches updates",
    ),
    _key_alias(
        "max_new_tokens, max_tokens, max_completion_length, max_response_length, generate_max_len, "
        "rollout_max_response_len, response length, max_gen_len",
        "rollout.max_response_tokens",
    ),
    _key_alias(
        "max_prompt_length, prompt_max_len, max_model_len, seq_len, context length, max_length",
        "rollout.max_model_len",
        "longer questions are left out and counted",
    ),
    _key_alias(
        "vllm_gpu_memory_utilization, gpu_memory_utilization, mem_fraction_static",
        "rollout.gpu_memory",
    ),
    _key_alias(
        "vllm_tensor_parallel_size, tensor_model_parallel_size, rollout_num_gpus_per_engine, tp",
        "rollout.tensor_parallel parallel.tensor",
        "engines and trainer each have their own",
    ),
    _key_alias("vllm_num_engines, num_engines, replicas, rollout workers", "rollout.engines"),
    _key_alias(
        "colocate, vllm_mode, colocate_all_models, free_cache_engine, hybrid engine, sleep mode, "
        "enable_sleep_mode",
        "rollout.colocated",
        page="engines.md",
    ),
    _key_alias("temperature, sampling temperature", "rollout.temperature eval.temperature"),
    _key_alias(
        "7B on 8 GPUs, one node, single node, 8xH100, 8 GPUs, small cluster",
        "parallel.processes rollout.engines",
        "a recipe: examples/one_node/qwen2.5-7b.yaml; megatron-r1 plan RECIPE says what fits",
        "plan.md",
    ),
    # rewards and data
    _key_alias(
        "reward_funcs, custom_reward_function, compute_score, remote_rm_url, custom_rm_path, "
        "rm_type, reward function, verifier, rubric",
        "data.kind rewards.weights rewards.options",
        "module:function; functions written for TRL and verl are called as there",
        "rewards.md",
    ),
    _key_alias("reward_weights, reward shaping, reward scale", "rewards.weights"),
    _key_alias(
        "reward_model.ground_truth, ground_truth, label_key, answer_key, prompt_key, input_key, "
        "column names",
        "data.columns",
        page="init.md",
    ),
    _key_alias(
        "system prompt, apply_chat_template, chat template, prompt_template, input_template",
        "data.template",
        page="init.md",
    ),
    _key_alias(
        "answer extraction, boxed, last number, answer format, math_verify",
        "rewards.reading",
        page="rewards.md",
    ),
    _key_alias("kl_reward, use_kl_in_reward, apply_kl_to_reward", "rl.algorithm rl.kl_beta",
               "rloo, reinforce_pp and ppo have KL in the reward, the others in the loss",
               "algorithms.md"),
    # the loss
    _key_alias(
        "kl_coef, beta, kl_loss_coef, init_kl_coef, kl_ctrl.kl_coef, use_kl_loss, kl penalty, "
        "kl_beta",
        "rl.kl_beta",
        page="algorithms.md",
    ),
    _key_alias("KL-free, no KL, without KL, no reference model, kl_coef 0", "rl.kl_beta",
               "0: no penalty, and no reference is kept", "algorithms.md"),
    _key_alias("kl_loss_type, kl_estimator, low_var_kl, k1, k2, k3, unbiased KL, "
               "use_bias_correction_kl", "rl.kl_estimator"),
    _key_alias("sync_ref_model, ref_model_sync_steps, ref_update_steps, reference model update",
               "rl.reference_refresh"),
    _key_alias(
        "epsilon, clip_ratio, eps_clip, cliprange, clip range, epsilon_low, clip_ratio_low",
        "rl.clip_low rl.clip_high",
    ),
    _key_alias("epsilon_high, clip_ratio_high, eps_clip_high, clip higher", "rl.clip_high"),
    _key_alias("clip_ratio_c, dual clip, delta", "rl.dual_clip"),
    _key_alias("entropy_coeff, entropy_coef, entropy_loss_coef, entropy bonus", "rl.entropy_coef"),
    _key_alias(
        "loss_agg_mode, loss_type, token-level loss, seq-mean-token-mean, token-mean, length bias, "
        "loss normalization",
        "rl.loss_average",
    ),
    _key_alias(
        "scale_rewards, norm_adv_by_std_in_grpo, std normalization, advantage normalization, "
        "whiten_rewards",
        "rl.advantage_std",
    ),
    _key_alias(
        "adv_estimator, advantage_estimator, GRPO, PPO, RLOO, REINFORCE++, DAPO, GSPO, Dr. GRPO, "
        "CISPO",
        "rl.algorithm",
        page="algorithms.md",
    ),
    _key_alias("GDPO, multi-reward normalization, multi_objective_aggregation, normalize_then_sum",
               "rl.reward_normalization", page="algorithms.md"),
    _key_alias("importance_sampling_level, sequence-level ratio", "rl.ratio_level"),
    _key_alias("lambd, lam, gae lambda, gamma, discount", "rl.gae_lambda rl.discount"),
    _key_alias("filter_groups, dynamic_filtering, dynamic_sampling_filter_path, dynamic sampling, "
               "zero variance groups, zero_std", "rl.dynamic_sampling rl.dynamic_sampling_rounds"),
    _key_alias(
        "overlong filtering, mask_truncated_completions, mask truncated, truncated responses",
        "rl.truncated",
        "mask: they are left out of the loss; rl.overlong_buffer penalizes them softly",
        "algorithms.md",
    ),
    _key_alias("overlong_buffer, soft overlong punishment, length penalty", "rl.overlong_buffer",
               page="algorithms.md"),
    _key_alias(
        "TIS, truncated importance sampling, tis_imp_ratio_cap, use_tis, tis_clip, rollout_is, "
        "vllm_importance_sampling_correction, vllm_importance_sampling_cap, "
        "enable_vllm_is_correction",
        "rl.importance_cap",
        "each token's weight is π_old / π_engine, at most the cap",
        "push.md",
    ),
    _key_alias(
        "MIS, masked importance sampling, rollout_rs, icepop, seq-mask-tis, geometric mask, DPPO, "
        "dppo_tv, rejection of tokens",
        "rl.engine_mask rl.engine_mask_low rl.engine_mask_high",
        page="algorithms.md",
    ),
    _key_alias(
        "mismatch, training-inference mismatch, logprob diff, rollout_probs_diff, off-policy "
        "correction",
        "rl.importance_cap rl.engine_mask rl.routing_replay push.probe_tolerance",
        "logprob_diff of metrics.jsonl measures it on every step",
        "push.md",
    ),
    _key_alias("R3, routing replay, router replay, use_rollout_routing_replay", "rl.routing_replay",
               page="routing_replay.md"),
    _key_alias(
        "async, asynchronous, max_async_level, max_off_policy_steps, off-policy steps, "
        "one-step off, partial rollout, partial_rollout, staleness_threshold",
        "rl.staleness",
        page="engines.md",
    ),
    # the run
    _key_alias(
        "ppo_mini_batch_size, global_batch_size, steps_per_generation, mini batch, "
        "updates per rollout",
        "rl.minibatches",
        "a number of mini-batches, not their size",
    ),
    _key_alias(
        "num_iterations, ppo_epochs, mu, inner epochs",
        "rl.minibatches",
        "every response is trained on once: one inner epoch, as in R1",
    ),
    _key_alias(
        "per_device_train_batch_size, gradient_accumulation_steps, micro_train_batch_size, "
        "ppo_micro_batch_size_per_gpu, ppo_max_token_len_per_gpu, max_tokens_per_gpu, "
        "use_dynamic_bsz, micro batch",
        "parallel.tokens_per_microbatch",
    ),
    _key_alias("gradient_checkpointing, activation checkpointing, recompute", "parallel.recompute"),
    _key_alias(
        "max_steps, num_train_epochs, total_epochs, total_training_steps, num_rollout, "
        "num_episodes, epochs",
        "run.steps sft.epochs",
        "rl counts rollouts",
    ),
    _key_alias("warmup_steps, warmup_ratio, lr_warmup_steps, lr_warmup", "optimizer.warmup_updates",
               "a number of optimizer steps"),
    _key_alias("lr, actor_learning_rate, optim.lr", "optimizer.learning_rate"),
    _key_alias("lr_scheduler_type, lr_decay_style, cosine", "optimizer.decay"),
    _key_alias("max_grad_norm, clip_grad, gradient clipping, max_norm", "optimizer.clip_grad"),
    _key_alias("save_steps, save_freq, save_interval, ckpt_interval", "checkpoint.every"),
    _key_alias("save_total_limit, max_actor_ckpt_to_keep, max_ckpt_num", "checkpoint.keep"),
    _key_alias("resume_from_checkpoint, resume_mode, load_checkpoint, resume",
               "checkpoint.verify", "the same command continues a run", "checkpoints.md"),
    _key_alias("eval_steps, test_freq, eval_interval, val_before_train", "eval.every",
               "rl evaluates before the first step, too"),
    _key_alias(
        "pass@1 on AIME, AIME, AIME 2024, MATH-500, GPQA, LiveCodeBench, benchmark",
        "eval.benchmarks eval.samples",
        "megatron-r1 eval: pass@1 is the mean over eval.samples responses",
        "evaluation.md",
    ),
    _key_alias("maj@k, cons@64, majority vote, self-consistency", "eval.samples",
               page="evaluation.md"),
    _key_alias("report_to, wandb, wandb_project, tensorboard, mlflow, logger, use_wandb",
               "run.trackers run.project", page="trackers.md"),
    _key_alias("output_dir, default_local_dir, save_path, ckpt_path", "run.folder"),
    _key_alias("pretrain, model_name_or_path, hf_checkpoint, actor_rollout_ref.model.path",
               "model.path"),
    _key_alias("n_gpus_per_node, nnodes, world size, num_gpus, actor_num_gpus_per_node",
               "parallel.processes", page="slurm.md"),
    _key_alias("ZeRO, zero_stage, FSDP, deepspeed, distributed optimizer",
               "parallel.processes parallel.optimizer_offload",
               "Megatron's distributed optimizer is always on: moments are spread over data ranks",
               "parallelism.md"),
    _key_alias("adam_offload, optimizer_offload, cpu offload, param_offload, offload_train",
               "parallel.offload_between_phases parallel.optimizer_offload "
               "parallel.reference_offload"),
    _key_alias("peft, use_peft, lora_rank, lora_alpha, QLoRA", "model.lora", page="lora.md"),
    _key_alias("lora.merge, enable_lora, max_lora_rank, LoRARequest", "push.adapter_only",
               page="lora.md"),
    _key_alias("multi_turn, tool use, agent loop, environment, tools",
               "agents.environment agents.max_turns", page="agents.md"),
    _key_alias("best of n, rejection sampling, RFT", "sample.samples sample.keep.choose",
               page="sample.md"),
    _key_alias("knowledge distillation, GKD, OPD, teacher", "teacher.path", page="distillation.md"),
    _key_alias(
        "MOPD, multi-teacher, teacher_model_configs", "teacher.by_source", page="distillation.md"
    ),
    _key_alias("ray, ray start, placement group, num_nodes", "rollout.placement",
               "there is no Ray: torchrun or Slurm start a run", "slurm.md"),
)  # fmt: skip


def find_aliases(text: str, *, exact: bool = False) -> list[KeyAlias]:
    """Return the rows of the table that a name of another system means.

    They are the rows with that very name, else those with a name that contains all of its words.

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
