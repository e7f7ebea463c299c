"""The card's benchmarks: their protocols, a runner, and the tables and pictures of a report."""
