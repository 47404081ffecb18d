"""Loss functions: pure functions of tensors, without configuration, storage or modules."""
