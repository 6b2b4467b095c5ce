"""Mixed precision: which layer gets how many bits.

`cost` says what an allocation costs, `sensitivity` what each width of each tensor loses, `solver` finds the best allocation
under a budget, exactly; `budget_search` and `width_search` (EdMIPS) are the two strategies, `allocation_file` what they
write. Import from these modules: the configuration reads allocations, and is below everything else here.
"""
