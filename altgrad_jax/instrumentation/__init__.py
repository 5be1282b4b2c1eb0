"""Any JAX loss function under the number formats and recipes of this project, without a change of the model."""
