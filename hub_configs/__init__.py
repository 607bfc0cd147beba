"""One YAML a checkpoint of the zoo; read by l2r2_models.models.hub_configs."""
