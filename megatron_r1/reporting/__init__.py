"""What a person sees of a run: its folder, the live view, TensorBoard events and the report."""
