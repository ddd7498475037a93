"""What a training run will need and cost, by arithmetic, before a cluster is rented."""
