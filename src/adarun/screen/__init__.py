"""What a person sees of a job: what is known of it (model), which lines that makes (rows), how they look (view)."""
