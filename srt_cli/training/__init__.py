"""What sft and dpo share: sequences and masks, loading, launching, health."""
