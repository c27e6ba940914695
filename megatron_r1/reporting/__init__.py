"""The output of a run for people.

- `run_folder`: the folder of a run; `folder_lock`: keeps it to one process.
- `live`, `live_frame`, `text_bars`: the live view.
- `trackers`: the curves in TensorBoard, Weights & Biases and others.
- `outcome`: the held-out result as a sentence, with its `change_interval`.
- `run_report`: the report of a run, from its `evaluations`, `plots`, `samples` and a template of
  `pages`.
- `record_values`: values of metrics and samples, where they may be missing.
- `formatting`: numbers and texts as people read them."""
