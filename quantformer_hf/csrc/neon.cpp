namespace quantformer { struct InstructionSet; const InstructionSet* neon() { return nullptr; } }
