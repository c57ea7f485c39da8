from csp_syncer.main import main

main()
