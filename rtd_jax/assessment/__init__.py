"""Jobs that judge any Llama checkpoint: evaluation on tasks, and diagnosis of a student against its teacher."""
