"""Two networks on tasks that conflict, and what the tasks share: ``python examples/compare_networks.py``."""

import sys

import varshare_rl as vs

if __name__ == "__main__":
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    agents = {
        network: vs.train(
            "pointmass",
            "env.tasks=[normal_left,normal_right,swapped_left,swapped_right]",
            network=network,
            total_transitions=budget,
            device="cpu",
            log={"quiet": True},
        )
        for network in ("shared", "varshare_lora")
    }
    for network, agent in agents.items():
        results = agent.results
        stored = results["parameters"]["stored"]
        print(f"{network}: success {results['mean_success']:.2f}, {stored:,} parameters, {agent.run_dir}")

    agent = agents["varshare_lora"]
    sharing = agent.sharing()
    print(f"shared: {sharing['sharing']:.1%} of the squared weights")
    print("nats:", {task: round(nats) for task, nats in agent.kl().items()})
    print("clusters:", sharing["clusters"]["count"])
    agent.export("normal_left", agent.run_dir / "normal_left")  # for others: a plain PyTorch network in files
