"""Many prompts from a file, answered together; what is finished is on disk and not run again."""
