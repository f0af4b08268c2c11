"""The gate: baselines kept in git, and the verdict on a run against one."""
