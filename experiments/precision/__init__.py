"""What bfloat16 products do to learning."""
