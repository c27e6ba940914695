"""What a run needs before a GPU is rented, each number with its formula (docs/plan.md).

`megatron-r1 plan` prints it. The modules, in the order of an estimate:

- What is planned: `job_options`, the options; `recipe_job`, from options and recipe to the `job`,
  and `job_checks`, which jobs are impossible;
  `hardware`, the rates, `assumptions`, the efficiencies, and `calibration_file`, those of
  `--calibrate`; `quantity`, a number with
  unit, formula and range.
- Counts: `counts`, parameters; `flops`, operations; `communication`, bytes that trainer ranks send.
- The trainer: `memory`, of its ranks; `offload`, what leaves the GPU between phases;
  `exchange_overlap_time`, the exchange with experts behind computation; `step_time`, seconds of
  micro-batches and updates; `build`, the real ranks, compared with the plan.
- The engines: `engine_memory`, weights and caches; `engine_buffers`, what DeepEP holds, and
  `expert_balancer`, what vLLM's balancer holds and moves; `engine_communication`, exchanges between
  GPUs; `rollout`, seconds of decoding; `teacher`, engines of teachers.
- Between them: `push_costs`, a push's bytes, with the links of `push_traffic`; `sample_traffic`,
  samples on their way to the trainer.
- The estimate: `timing`, a step's seconds by part, with loads, sleeps and saves; `time_ranges`,
  their ranges and what narrows them; `estimate`, all sections and what does not fit; `search`,
  layouts that fit; `estimate_output`, all of it as text and JSON.
- Measurements: `calibration`, numbers that a run gives; `published_runs`, published figures, with
  `published_calibration`, the plan's against them, and its `published_table`."""
