// Table measures mitoken beside its peers, all in one run, and prints the ratios as
// Markdown:
//
//	cd benchmarks && go run ./table
//
// or draws them:
//
//	cd benchmarks && go run ./table -picture cost.svg
//
// It takes about a minute. Nanoseconds are of this machine; ratios within a run
// are the point. The exit code is 1 if a row falls short.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aztoso/mitoken"
)

const rounds = 5 // of each figure, of which the median counts

func main() {
	if first(os.Args[1:]) { // this process is one of those that are measured
		return
	}
	testing.Init()
	quick := flag.Bool("quick", false, "measure less long, to see that all of it runs")
	picture := flag.String("picture", "", "draw an SVG `file` in place of the table")
	flag.Parse()
	_ = flag.Set("test.benchtime", "200ms")
	if *quick {
		_ = flag.Set("test.benchtime", "1ms")
	}
	if *picture != "" {
		if err := draw(*picture); err != nil {
			fmt.Fprintln(os.Stderr, "table:", err)
			os.Exit(1)
		}
		return
	}
	t := &table{quick: *quick}
	t.cached()
	t.resources()
	t.hanging()
	t.roundTrip()
	t.firstToken()
	t.stampede()
	t.failing()
	t.rest()
	t.binary()
	fmt.Printf("\n%s, %d cores, %s.\n", time.Now().Format("2006-01-02"), runtime.NumCPU(), runtime.Version())
	if t.short && !*quick {
		os.Exit(1)
	}
}

// A table is printed as it grows.
type table struct {
	quick  bool
	headed bool
	short  bool // a row falls short
}

// row prints one: what is measured, what came of it, what must, and how the others
// do.
func (t *table) row(what, ours, wanted string, holds bool, others string) {
	if !t.headed {
		fmt.Println("| what | mitoken | wanted | the others |\n|---|---|---|---|")
		t.headed = true
	}
	if !holds {
		t.short = true
		ours += " (falls short)"
	}
	fmt.Printf("| %s | %s | %s | %s |\n", what, ours, wanted, others)
}

// cost is what a call costs, from one goroutine or from many for each CPU.
func cost(goroutines int, get func(context.Context) error) (ns float64, allocs int64) {
	ctx := context.Background()
	r := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		if goroutines == 1 {
			for b.Loop() {
				if err := get(ctx); err != nil {
					b.Fatal(err)
				}
			}
			return
		}
		b.SetParallelism(goroutines)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := get(ctx); err != nil {
					b.Error(err)
				}
			}
		})
	})
	if r.N == 0 {
		panic("a benchmark has failed")
	}
	return float64(r.T.Nanoseconds()) / float64(r.N), r.AllocsPerOp()
}

// costs are those of several, measured in turn, so that what else the machine does
// befalls all of them alike.
func costs(goroutines int, who []contestant) (ns []float64, allocs []int64) {
	runs := make([][]float64, len(who))
	allocs = make([]int64, len(who))
	for range rounds {
		for i, c := range who {
			n, a := cost(goroutines, c.get)
			runs[i], allocs[i] = append(runs[i], n), a
		}
	}
	for _, r := range runs {
		ns = append(ns, median(r))
	}
	return ns, allocs
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

// cached is a token from the cache.
func (t *table) cached() {
	cred, src, tok := newSource()
	defer cred.Close()
	who := append([]contestant{
		floor(tok),
		{"Token", func(context.Context) error { _, err := src.Token(); return err }},
		{"TokenContext", func(ctx context.Context) error { _, err := src.TokenContext(ctx); return err }},
		{"GetToken", func(ctx context.Context) error { _, err := cred.GetToken(ctx, scope); return err }},
	}, peers(src)...)
	for _, goroutines := range []int{1, 64} {
		ns, allocs := costs(goroutines, who)
		from := "from 1 goroutine"
		if goroutines > 1 {
			from = fmt.Sprintf("from %d goroutines per CPU", goroutines)
		}
		var others []string
		for i := 4; i < len(who); i++ {
			others = append(others, fmt.Sprintf("%s %.3gx, %d allocations", who[i].name, ns[i]/ns[0], allocs[i]))
		}
		for i, most := range map[int]float64{1: 1.15, 2: 1.3, 3: 1.3} {
			if goroutines > 1 && i > 1 {
				continue
			}
			list := "as above"
			if i == 1 {
				list = strings.Join(others, "; ")
			}
			t.row(who[i].name+", cached, "+from, fmt.Sprintf("%.2fx the floor of %.0f ns, %d allocations", ns[i]/ns[0], ns[0], allocs[i]),
				fmt.Sprintf("at most %.2fx, 0", most), ns[i]/ns[0] <= most && allocs[i] == 0, list)
		}
	}
}

// resources is GetToken for one of many resources.
func (t *table) resources() {
	var who []contestant
	for _, n := range []int{10, 100, 1000} {
		cred := &mitoken.Credential{Upstream: issuer{}} // IMDS would be asked five times a second
		defer cred.Close()
		for i := range n {
			must(cred.TokenSource(fmt.Sprint("https://service.example/", i)).Token())
		}
		last := tokenOptions(fmt.Sprint("https://service.example/", n-1))
		who = append(who, contestant{fmt.Sprint(n), func(ctx context.Context) error { _, err := cred.GetToken(ctx, last); return err }})
	}
	ns, _ := costs(1, who)
	t.row("GetToken with 10, 100, 1,000 resources in the cache", fmt.Sprintf("%.0f, %.0f, %.0f ns", ns[0], ns[1], ns[2]),
		"flat", ns[2] < 1.3*ns[0], "")
}

// roundTrip is what it costs to attach a token.
func (t *table) roundTrip() {
	cred, src, _ := newSource()
	defer cred.Close()
	ns, allocs := costs(1, transports(src))
	t.row("RoundTrip, 5 headers, a base that does nothing", fmt.Sprintf("%.2fx of x/oauth2's time, %d allocations", ns[0]/ns[1], allocs[0]),
		"at most 0.45x, 3", ns[0]/ns[1] <= 0.45 && allocs[0] == 3, fmt.Sprintf("x/oauth2 %.0f ns, %d allocations", ns[1], allocs[1]))
}

// binary is what an import costs.
func (t *table) binary() {
	with, without := size("github.com/aztoso/mitoken", "mitoken.Credential{}"), size("github.com/Azure/azure-sdk-for-go/sdk/azidentity", "azidentity.DefaultAzureCredential{}")
	more := 100 * (with - without) / without
	t.row("a program with a Credential, beside one with azidentity's default credential", fmt.Sprintf("%+.1f %%", more), "at most +5 %", more <= 5,
		fmt.Sprintf("azidentity: %.1f MB", without/1e6))
}

// size is that of a program which uses a package as programs do.
func size(path, value string) float64 {
	dir := must(os.MkdirTemp(".", "size"))
	defer os.RemoveAll(dir)
	name := path[strings.LastIndex(path, "/")+1:]
	program := fmt.Sprintf("package main\n\nimport (\n\t\"context\"\n\t\"fmt\"\n\n\t\"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy\"\n\t%q\n)\n\n"+
		"func main() {\n\tcred := &%s\n\tfmt.Println(cred.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{\"r/.default\"}}))\n}\n", path, value)
	if name == "azidentity" {
		program = strings.Replace(program, "cred := &azidentity.DefaultAzureCredential{}", "cred, _ := azidentity.NewDefaultAzureCredential(nil)", 1)
	}
	if err := os.WriteFile(dir+"/main.go", []byte(program), 0o600); err != nil {
		panic(err)
	}
	if out, err := exec.Command("go", "build", "-o", dir+"/program", "./"+dir).CombinedOutput(); err != nil {
		panic(string(out))
	}
	return float64(must(os.Stat(dir + "/program")).Size())
}
