"""Commands as a graph of stages (docs/pipeline.md): `pipeline_recipe`, `plan` and `graph` are the
recipe and its stages, `manifest` and `status` say which are done or stale, `executor`,
`stage_runner`, `child` and `serving` run the others, and `results`, `report` and `graph_svg` have
their numbers and the drawing of the graph."""
