"""Checkpoints of a run.

`checkpoint_folders` chooses, sets aside and deletes those in a folder, each by its `manifest`, both
without torch; `contents` has what a rank saves, and verifies and reads it at any parallel layout;
`checkpoint_plan` copies a rank's part into host memory (`staging`), where `optimizer_gathering`
gathers the optimizer's; `writer` writes the copies while training goes on, and
`adapter_checkpoint` is the content with `model.lora`. The controller's part is
`controller.checkpoint_series`; docs/checkpoints.md describes the folder and what happens after
each kind of damage."""
