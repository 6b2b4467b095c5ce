namespace quantformer { struct InstructionSet; const InstructionSet* avx512() { return nullptr; } }
