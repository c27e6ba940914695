"""Training data, of files and of tasks, as prompts and tokens.

- Rows: `dataset_files` finds the files, of the split that `dataset_splits` chooses, `table_files`
  reads them, `rows` names their columns, which `columns` guesses, `row_filter` keeps some, and
  `data_report` counts the others.
- Prompts: `prompt`, `prompt_reader`, `prompts`, `prompt_split` with the held-out ones, `gym_tasks`,
  `few_shot`.
- Supervised examples: `chats`, `sft`, `mixture`; of reward models: `preferences`.
- Tokens: `tokenizer`, `end_tokens`, `byte_decoder`, `prompt_templates`, `prompt_tokenizer`,
  `sft_tokenizer`, `preference_tokenizer`.
- Order: `sampler`."""
