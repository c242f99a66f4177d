"""A cluster as a cost model: trains and judges policies, answers what-if."""
