"""The output of a run for people: its folder (`run_folder`), the live view (`live`, `live_frame`),
trackers, the held-out result (`outcome`) and the report (`report`, from `page` and `plots`)."""
