"""Students: training text whose targets are a teacher's translations (knowledge distillation)."""
